"""Which files lean on private parts of Ray: a new version of Ray may break these, and no others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ray_ds

ROOT = Path(ray_ds.__file__).parent
OF_CORE = re.compile(r"\bray\._(private|raylet|internal)")
OF_TRAIN = re.compile(r"\bray\.train\.v2\._internal|\b_TorchBackend\b")
LEAN_ON_CORE = {
    "on_ray/autoscaler.py",  # what the node autoscaler last said
    "on_ray/nodes.py",  # which nodes drain, and what is free on each
    "on_ray/run_lock.py",  # whether a job's driver is gone
    "verify/node_settings.py",  # what a node was started with
}
LEAN_ON_TRAIN = {"on_ray/elastic.py", "on_ray/failures.py", "on_ray/spares.py"}


def files_with(pattern: re.Pattern[str]) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if pattern.search(path.read_text())}


def test_private_parts_are_used_in_these_files_alone() -> None:
    assert files_with(OF_CORE) == LEAN_ON_CORE
    assert files_with(OF_TRAIN) == LEAN_ON_TRAIN


@pytest.mark.shows("Training with `scaling = stock` needs no private part of Ray Train")
def test_what_leans_on_ray_train_is_not_imported_for_stock_scaling() -> None:
    code = "import sys, ray_ds.on_ray.trainer; print(*(name for name in sys.modules if name.startswith('ray_ds.')))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "ray_ds.on_ray.trainer" in found
    leaning = {f"ray_ds.{name.removesuffix('.py').replace('/', '.')}" for name in LEAN_ON_TRAIN}
    assert not leaning & set(found)
