"""What a node says about itself. It travels by value and needs no package: ray_ds itself may be missing there."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "deepspeed", "pyarrow")


def probe_node() -> dict[str, Any]:
    """Return versions, limits, space, time and locks of the node that this runs on, as JSON values."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "ray_ds": describe_package("ray_ds"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_bytes": total_bytes("/dev/shm"),
        "temp": tempfile.gettempdir(),
        "temp_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "locks": find_locks(extensions_folder()),
        "arch_list": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        "time": time.time(),
    }


def package_version(name: str) -> str:
    """Return the version of an installed package; `missing` where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def describe_package(name: str) -> dict[str, str]:
    """Return where a package lies and a hash of its source files, without importing it."""
    sys.path_importer_cache.clear()
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return {"version": "missing", "folder": "", "sha256": ""}
    folder = Path(spec.origin).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return {"version": package_version(name), "folder": str(folder), "sha256": digest.hexdigest()[:16]}


def total_bytes(folder: str) -> int:
    """Return the size of a file system; 0 where there is no such folder."""
    return shutil.disk_usage(folder).total if os.path.isdir(folder) else 0


def extensions_folder() -> Path:
    """Return where torch builds its extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "torch_extensions"


def find_locks(folder: Path) -> list[dict[str, Any]]:
    """Return the lock files of extension builds: a build that runs holds its own open, one that was killed does not."""
    locks = []
    for path in sorted(folder.glob("**/lock")):
        try:
            stat = path.stat()
        except OSError:  # released in between
            continue
        file = f"{stat.st_ino}-{stat.st_mtime_ns}"
        age_s = max(0.0, time.time() - stat.st_mtime)
        locks.append({"path": str(path), "file": file, "age_s": age_s, "is_held": is_open(path)})
    return locks


def is_open(path: Path) -> bool:
    """Tell whether a process of this node has a file open, as far as this user may look."""
    wanted = path.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if Path(os.readlink(link)) == wanted:
                return True
        except OSError:  # the process is gone, or not ours
            continue
    return False
