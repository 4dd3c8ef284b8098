import json
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.train.checkpoints import find_latest
from ray_ds.train.host import Request
from ray_ds.train.task import TrainTask
from tests.train.runs import curve, make_settings, make_task, read_records, train_in_processes

RUN = {"steps": 14, "validate_every": 5, "validation_tokens": 100, "zero_stage": 2}
SETTINGS = make_settings(**RUN)
DENSE = {**RUN, "model": {"preset": "tiny", "n_routed_experts": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def whole(folder: Path) -> TrainTask:
    """A run of two processes that nothing interrupts."""
    task = make_task(folder, SETTINGS, "whole")
    train_in_processes(task)
    return task


@pytest.fixture(scope="module")
def whole_dense(folder: Path) -> TrainTask:
    """The same of a dense model: with experts, a token whose best two are alike but for rounding may change over."""
    task = make_task(folder, make_settings(**DENSE), "whole_dense")
    train_in_processes(task)
    return task


@pytest.mark.shows("A killed training run, resumed, has the losses of an uninterrupted one")
@pytest.mark.slow
def test_killed_run_goes_on_with_the_losses_of_an_uninterrupted_one(folder: Path, whole: TrainTask) -> None:
    killed = make_task(folder, SETTINGS, "killed")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train_in_processes(killed, die_at_step=8)
    train_in_processes(killed)
    assert curve(read_records(killed)) == curve(read_records(whole))
    weights = "model/model.safetensors"
    assert (Path(killed.output) / weights).read_bytes() == (Path(whole.output) / weights).read_bytes()


@pytest.mark.slow
def test_number_of_workers_changes_rounding_only(folder: Path, whole: TrainTask) -> None:
    task = make_task(folder, make_settings(steps=14, zero_stage=2, num_workers=1), "alone")
    train_in_processes(task)
    alone, together = ([record["loss"] for record in read_records(each)] for each in (task, whole))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.shows("Training stops when it is told to, and goes on with any other number of workers")
@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1)])
def test_stopped_run_goes_on_with_another_number_of_workers(
    folder: Path, whole_dense: TrainTask, first: int, second: int
) -> None:
    settings = make_settings(**DENSE, num_workers=[1, 3])
    task = make_task(folder, settings, f"stopped-{first}-{second}")
    train_in_processes(task, world_size=first, requests={7: Request.STOP})
    assert not (Path(task.output) / "metrics.jsonl").exists()
    commit = find_latest(task.checkpoints)
    assert commit is not None and (commit.step, commit.world_size, commit.extra["cursor"]) == (7, first, 7)
    train_in_processes(task, world_size=second)
    expected, records = read_records(whole_dense), read_records(task)
    assert [record["world_size"] for record in records] == [first] * 7 + [second] * 7
    assert [record["lr"] for record in records] == [record["lr"] for record in expected]
    torch.testing.assert_close([r["loss"] for r in records], [r["loss"] for r in expected], rtol=1e-5, atol=0)
    looks = [[r["validation_loss"] for r in each if "validation_loss" in r] for each in (records, expected)]
    torch.testing.assert_close(looks[0], looks[1], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_run_learns_and_measures(whole: TrainTask) -> None:
    records = read_records(whole)
    assert [record["step"] for record in records] == list(range(1, 15))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert [record["step"] for record in records if "validation_loss" in record] == [5, 10, 14]
    assert abs(records[-1]["validation_loss"] - records[-1]["loss"]) < 0.5
    assert all(record["tokens_per_s"] > 0 and record["mfu"] > 0 and record["max_violation"] >= 0 for record in records)


@pytest.mark.slow
def test_run_leaves_a_model_and_a_curve(whole: TrainTask) -> None:
    assert (Path(whole.output) / "curve.png").read_bytes().startswith(b"\x89PNG")
    decoder = load_checkpoint_folder(Path(whole.output) / "model", dtype=torch.float32, device="cpu")
    assert decoder.config == whole.config
    config = json.loads((Path(whole.output) / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert any(bool(buffer.any()) for name, buffer in decoder.named_buffers() if name.endswith("correction_bias"))
