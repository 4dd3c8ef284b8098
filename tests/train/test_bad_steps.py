"""Steps whose loss is no number or jumps: judged alike everywhere, and skipped or rolled back as the recipe says."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from ray_ds.train.bad_steps import WINDOW, BadSteps
from ray_ds.train.task import TrainTask
from tests.train.processes import spawn
from tests.train.runs import PlainHost, make_settings, make_task, read_records, train_in_processes

BAD_STEP = 6


def records(count: int) -> list[dict[str, float]]:
    return [{"loss": 2.0}] * count


def test_a_spike_is_judged_by_the_median_of_the_last_good_losses() -> None:
    settings = make_settings(bad_loss="skip", loss_spike=1.5)
    judge = BadSteps(settings, records(WINDOW - 1)).judge
    assert judge(100.0) is None, "there are too few losses to tell a spike"
    judge = BadSteps(settings, records(WINDOW)).judge
    assert judge(2.9) is None
    assert judge(3.1) == "the loss is 3.1, over 1.5 times the median of the last 32, 2"
    assert judge(3.1) is not None, "a spike does not count towards the median"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_no_number_is_bad_in_any_precision(precision: str) -> None:
    judge = BadSteps(make_settings(precision=precision, zero_stage=1), []).judge
    assert (judge(math.nan), judge(math.inf)) == ("the loss is nan", "the loss is inf")


def test_without_a_threshold_no_loss_is_a_spike() -> None:
    assert BadSteps(make_settings(bad_loss="skip"), records(WINDOW)).judge(1e9) is None


def test_bad_steps_are_bounded() -> None:
    bad_steps = BadSteps(make_settings(bad_loss="skip", max_bad_steps=2), [])
    bad_steps.add(5, "the loss is nan")
    bad_steps.add(6, "the loss is nan")
    with pytest.raises(FloatingPointError, match=r"step 7 is bad, the 3th that is: the loss is nan; lower"):
        bad_steps.add(7, "the loss is nan")


def run_with_a_bad_step(rank: int, world_size: int, store: str, raw: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    from ray_ds.train import bad_steps
    from ray_ds.train.loop import train

    seen: list[float] = []

    class OneBadStep(BadSteps):
        def judge(self, loss: float) -> str | None:
            seen.append(loss)
            return "it was chosen" if len(seen) == BAD_STEP else super().judge(loss)

    bad_steps.BadSteps = OneBadStep  # type: ignore[misc]
    import ray_ds.train.loop as loop

    loop.BadSteps = OneBadStep  # type: ignore[misc]
    train(TrainTask.from_dict(raw), PlainHost(rank, world_size))


def train_with_a_bad_step(task: TrainTask) -> list[dict[str, Any]]:
    store = Path(task.output) / "store"
    store.parent.mkdir(parents=True, exist_ok=True)
    world_size = task.settings.max_workers
    spawn(run_with_a_bad_step, (world_size, str(store), task.to_dict()), count=world_size)
    return read_records(task)


SETTINGS: dict[str, Any] = {"steps": 10, "checkpoint_every": 4, "zero_stage": 2, "max_bad_steps": 1}


@pytest.mark.slow
@pytest.mark.shows("A bad step is skipped or rolled back as the recipe says, and its data is passed over")
def test_a_bad_step_is_skipped_and_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    quiet = make_task(tmp_path, make_settings(steps=10, checkpoint_every=4, zero_stage=2), "quiet")
    train_in_processes(quiet)
    records = train_with_a_bad_step(make_task(tmp_path, make_settings(bad_loss="skip", **SETTINGS), "skip"))
    expected = read_records(quiet)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss"] for record in records[:BAD_STEP]] == [record["loss"] for record in expected[:BAD_STEP]]
    assert records[BAD_STEP - 1]["is_skipped"] and not any(r.get("is_skipped") for r in records[BAD_STEP:])
    assert records[BAD_STEP]["loss"] != expected[BAD_STEP]["loss"], "the weights are those before the bad step"


@pytest.mark.slow
def test_a_bad_step_is_rolled_back_to_the_last_checkpoint_and_its_batch_passed_over(tmp_path: Path) -> None:
    quiet = make_task(tmp_path, make_settings(steps=10, checkpoint_every=4, zero_stage=2), "quiet")
    train_in_processes(quiet)
    records = train_with_a_bad_step(make_task(tmp_path, make_settings(bad_loss="roll_back", **SETTINGS), "back"))
    expected = read_records(quiet)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss"] for record in records[:4]] == [record["loss"] for record in expected[:4]]
    # Step 5 is done anew, from the weights of step 4, with the batch after the bad one: the seventh.
    assert records[4]["loss"] != expected[4]["loss"]
    assert not any(record.get("is_skipped") for record in records)
    assert records[-1]["lost_s"] > 0


@pytest.mark.slow
def test_a_bad_step_ends_a_run_that_is_told_to_fail(tmp_path: Path) -> None:
    task = make_task(tmp_path, make_settings(steps=10), "fail")
    with pytest.raises(ProcessRaisedException, match="step 6 is bad: it was chosen; lower the learning rate, or set"):
        train_with_a_bad_step(task)
