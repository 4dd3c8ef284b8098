"""Files on local disks and object stores, named by absolute path or URI (`/data/x`, `s3://bucket/x`, `gs://bucket/x`)."""

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from pyarrow import fs

from ray_ds import object_store
from ray_ds.errors import RayDsError, StorageRefused

HASH_BLOCK_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file found below a folder."""

    path: str
    """Path relative to the folder that was listed, with forward slashes."""
    bytes: int


def is_remote(uri: str) -> bool:
    """Tell whether `uri` names an object store rather than a file every node must mount."""
    return "://" in uri and not uri.startswith("file://")


def is_absolute(uri: str) -> bool:
    """Tell whether `uri` means the same place in every working directory."""
    return "://" in uri or uri.startswith("/")


def join(uri: str, *parts: str) -> str:
    """Return the URI of a file below a folder."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of an absolute path or URI, and the path on it.

    Raises:
        ValueError: `uri` is relative.
        StorageUnavailable: the region of a bucket cannot be asked for.
    """
    if not is_absolute(uri):
        raise ValueError(f"{uri} is relative; storage takes absolute paths and URIs")
    if is_remote(uri):
        with failures_named(uri):
            return object_store.filesystem(uri)
    return fs.LocalFileSystem(), str(local_path(uri))


@contextlib.contextmanager
def failures_named(uri: str) -> Iterator[None]:
    """Raise what goes wrong inside as an error that names the place and says whether trying again helps.

    A file that is not there stays a `FileNotFoundError`, and what this package raised stays as it is.

    Raises:
        StorageRefused: until somebody mends it: a full disk, a wrong key, no such bucket.
        StorageUnavailable: an object store that does not answer.
    """
    try:
        yield
    except (RayDsError, FileNotFoundError):
        raise
    except OSError as error:
        if is_remote(uri):
            raise object_store.explain(uri, error) from error
        if error.errno in DISK_FULL:
            raise _explain_full_disk(uri, error) from error
        raise


def _explain_full_disk(uri: str, error: OSError) -> StorageRefused:
    """Return an error that says which disk is full."""
    folder = next(folder for folder in local_path(uri).absolute().parents if folder.exists())
    disk = next(place for place in [folder, *folder.parents] if place.is_mount())
    usage = shutil.disk_usage(disk)
    reason = f"{error.strerror}: {usage.free:,} of {usage.total:,} bytes are free on the disk at {disk}"
    action = f"free space at {disk}, or choose a run_dir on another disk, and submit again"
    return StorageRefused(uri, reason, "must be on a disk with room for it", action, error.errno)


def local_path(uri: str) -> Path:
    """Return the path of a local URI."""
    assert not is_remote(uri), f"{uri} is not a local file"
    return Path(uri.removeprefix("file://"))


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    system, path = filesystem(uri)
    with failures_named(uri):
        return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Return a whole file.

    Raises:
        FileNotFoundError: there is none.
    """
    system, path = filesystem(uri)
    with failures_named(uri), system.open_input_stream(path, compression=None) as stream:
        data: bytes = stream.read()
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file so that a reader sees all of it or none, also when the writer is killed or the disk is full.

    Raises:
        StorageRefused, StorageUnavailable: as in `failures_named`; what was there before is still there.
    """
    if is_remote(uri):
        system, path = filesystem(uri)
        with failures_named(uri), system.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    with failures_named(uri):
        _replace(local_path(uri), data)


def _replace(target: Path, data: bytes) -> None:
    """Write a local file beside its place and move it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_files(folder: str) -> list[FileEntry]:
    """Return every file below `folder`, sorted by path; an absent folder has none. Partial writes are left out."""
    system, path = filesystem(folder)
    with failures_named(folder):
        found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = path.rstrip("/") + "/"
    entries = [
        FileEntry(path=info.path.removeprefix(prefix), bytes=info.size)
        for info in found
        if info.type == fs.FileType.File and not info.path.endswith(".partial")
    ]
    return sorted(entries, key=lambda entry: entry.path)


def glob_files(pattern: str) -> list[str]:
    """Return the sorted URIs of files that match an absolute pattern; `*` stays within a folder, `**` does not."""
    wild = next((i for i, part in enumerate(pattern.split("/")) if any(c in part for c in "*?[")), None)
    if wild is None:
        return [pattern] if exists(pattern) else []
    parts = pattern.split("/")
    folder = "/".join(parts[:wild]) or "/"
    tail = parts[wild:]
    return [
        join(folder, entry.path)
        for entry in list_files(folder)
        if _matches(list(PurePosixPath(entry.path).parts), tail)
    ]


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def read_blocks(uri: str) -> Iterator[bytes]:
    """Yield a file's bytes in blocks of `HASH_BLOCK_BYTES`."""
    system, path = filesystem(uri)
    with failures_named(uri), system.open_input_stream(path, compression=None) as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            yield block


def sha256_file(uri: str) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    for block in read_blocks(uri):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_version(uri: str) -> str:
    """Return the sha256 of a file, computed once in this process as long as its size and time of change stay."""
    system, path = filesystem(uri)
    with failures_named(uri):
        info = system.get_file_info(path)
    return _sha256_of_version(uri, info.size, info.mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _sha256_of_version(uri: str, _size: int, _mtime_ns: int) -> str:
    return sha256_file(uri)


def delete_folder(folder: str) -> None:
    """Delete a folder and what is in it; an absent one is no error."""
    system, path = filesystem(folder)
    with failures_named(folder):
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)
