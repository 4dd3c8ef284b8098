"""DeepSpeed's CPU communication op: built once at set-up, loaded as a file by workers, never compiled by them.

    python -m ray_ds.train.zero.build

Left alone, DeepSpeed compiles it in whichever process first makes a process group, under a lock file that outlives a
killed process and then hangs all later ones (pytorch#189245). Training runs without the op too: it only serves
DeepSpeed's own `inference_all_reduce`. This file leans on two private names of DeepSpeed 0.19.8,
`OpBuilder._loaded_ops` and `deepspeed.ops.__compatible_ops__`; tests/train/zero/test_build.py holds them.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

OP = ShareMemCommBuilder.NAME


def op_file() -> Path:
    """Return where the built op lies: in this environment, by the versions it was made for."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    version = f"deepspeed-{deepspeed.__version__}-torch-{torch.__version__}-python-{python}"
    return Path(sys.prefix) / "share" / "ray_ds" / version / f"{OP}.so"


def build() -> Path:
    """Compile the op unless that is done, and return its file.

    It is compiled in a folder of its own and moved at the end, so a killed build leaves no lock and no half op.
    """
    target = op_file()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        before = os.environ.get("TORCH_EXTENSIONS_DIR")
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        try:
            ShareMemCommBuilder().jit_load(verbose=False)
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
        (made,) = Path(folder).rglob(f"{OP}.so")
        shutil.move(made, target)
    return target


def use_built_op() -> bool:
    """Make DeepSpeed take the built op, or do without where there is none; tell which. Call it before `initialize`."""
    target = op_file()
    if target.exists():
        OpBuilder._loaded_ops[OP] = _load(target)
    # Given here, DeepSpeed does not probe compilers and GPUs for all of its ops.
    vars(deepspeed.ops)["__compatible_ops__"] = {OP: target.exists()}
    return target.exists()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(OP, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
