"""Profiles of chosen steps: what they name, and that steps outside cost nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.train import profile
from ray_ds.train.profile import StepProfiler

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    """Run steps whose matrix products have the step's number as size."""
    for step in range(first, last + 1):
        with profiler.step(step):
            with profiler.phase("forward_backward"):
                torch.mm(torch.ones(step, step), torch.ones(step, step))
            with profiler.phase("optimizer"):
                torch.ones(3).add_(1)


def read_trace(file: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return events


def count(file: Path, name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in read_trace(file))


@pytest.mark.shows("`profile_steps` leaves a trace of those steps and no other, by every worker, with named phases")
def test_only_the_chosen_steps_are_in_the_trace(tmp_path: Path) -> None:
    for rank in range(2):
        profiler = StepProfiler((3, 5), folder=str(tmp_path / "profile"), rank=rank, device=CPU)
        run_steps(profiler, 1, 8)
    names = sorted(file.name for file in (tmp_path / "profile").iterdir())
    assert names == [f"steps-000003-rank-0000{rank}.{end}" for rank in range(2) for end in ("trace.json.gz", "txt")]
    trace = tmp_path / "profile" / "steps-000003-rank-00001.trace.json.gz"
    assert count(trace, "aten::mm") == 3
    assert count(trace, "forward_backward") == count(trace, "optimizer") == 3
    assert "forward_backward" in (tmp_path / "profile" / "steps-000003-rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("begin", "end", "files"),
    [(1, 9, {3: 3}), (3, 9, {3: 3}), (4, 9, {4: 2}), (2, 4, {3: 2}), (6, 9, {}), (1, 1, {})],
)
def test_an_attempt_profiles_the_steps_that_it_runs(
    tmp_path: Path, begin: int, end: int, files: dict[int, int]
) -> None:
    profiler = StepProfiler((3, 5), folder=str(tmp_path), rank=0, device=CPU)
    run_steps(profiler, begin, end)
    profiler.close()
    traces = {int(file.name.split("-")[1]): count(file, "aten::mm") for file in tmp_path.glob("*.trace.json.gz")}
    assert traces == files


def test_steps_that_run_again_are_profiled_again(tmp_path: Path) -> None:
    run_steps(StepProfiler((2, 3), folder=str(tmp_path), rank=0, device=CPU), 1, 3)
    trace = tmp_path / "steps-000002-rank-00000.trace.json.gz"
    earlier = trace.read_bytes()
    run_steps(StepProfiler((2, 3), folder=str(tmp_path), rank=0, device=CPU), 4, 6)
    assert trace.read_bytes() == earlier
    run_steps(StepProfiler((2, 3), folder=str(tmp_path), rank=0, device=CPU), 1, 3)
    assert trace.read_bytes() != earlier and len(list(tmp_path.iterdir())) == 2


def test_nothing_is_made_when_no_steps_are_chosen(tmp_path: Path) -> None:
    profiler = StepProfiler(None, folder=str(tmp_path), rank=0, device=CPU)
    assert profiler.step(1) is profiler.step(2) is profiler.phase("data")
    run_steps(profiler, 1, 3)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_step_is_not_hidden_and_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = StepProfiler((1, 9), folder=str(tmp_path), rank=0, device=CPU)
    with pytest.raises(ZeroDivisionError), profiler.step(1):
        _ = 1 // 0

    def refuse(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.storage, "write_bytes", refuse)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
