import subprocess
import sys
from pathlib import Path

import pytest

from ray_ds.train.zero import build

START = """
import os
import torch.distributed
torch.distributed.init_process_group("gloo", init_method="file://" + {store!r}, rank=0, world_size=1)
from ray_ds.train.zero import build
{change}
print("uses", build.use_built_op())
import deepspeed
deepspeed.init_distributed(dist_init_required=False)
import deepspeed.comm.comm
print("has", deepspeed.comm.comm.cdb.shm_comm_op is not None)
"""


def start_worker(tmp_path: Path, change: str) -> str:
    """Make DeepSpeed's process group in a process that could not compile anything; return what it printed."""
    code = START.format(store=str(tmp_path / "store"), change=change)
    extensions = tmp_path / "extensions"
    env = {"DS_ACCELERATOR": "cpu", "PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(extensions), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not extensions.exists(), "a worker compiled an op"
    return done.stdout


def test_worker_takes_the_built_op(tmp_path: Path) -> None:
    build.build()
    output = start_worker(tmp_path, "")
    assert "uses True" in output and "has True" in output


def test_worker_does_without_an_op_that_is_not_built(tmp_path: Path) -> None:
    output = start_worker(
        tmp_path, f"build.op_file = lambda: __import__('pathlib').Path({str(tmp_path)!r}) / 'absent.so'"
    )
    assert "uses False" in output and "has False" in output


def test_build_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target = build.build()
    monkeypatch.setattr(build.ShareMemCommBuilder, "jit_load", lambda *_args, **_options: pytest.fail("built again"))
    assert build.build() == target and target.is_relative_to(sys.prefix)
