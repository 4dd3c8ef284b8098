import json
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from train.runs import curve, make_settings, make_task, read_records, train_in_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


MUON = {"optimizer": {"kind": "muon"}, "gradient_clipping": 0.0, "precision": "bf16", "zero_stage": 2}


@pytest.mark.parametrize("changes", [{"zero_stage": 1}, {"zero_stage": 3}, MUON], ids=["adamw-1", "adamw-3", "muon-2"])
def test_killed_run_goes_on_with_the_losses_of_an_uninterrupted_one(folder: Path, changes: dict) -> None:
    name = f"{changes['zero_stage']}-{'optimizer' in changes}"
    settings = make_settings(**changes)
    whole = make_task(folder, settings, f"whole-{name}")
    train_in_processes(whole)
    killed = make_task(folder, settings, f"killed-{name}")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train_in_processes(killed, die_at_step=5)
    train_in_processes(killed)
    assert curve(read_records(killed)) == curve(read_records(whole))
    weights = "model/model.safetensors"
    assert (Path(killed.output) / weights).read_bytes() == (Path(whole.output) / weights).read_bytes()


def test_number_of_workers_changes_rounding_only(folder: Path) -> None:
    losses = []
    for workers in (1, 2, 4):
        task = make_task(folder, make_settings(num_workers=workers), f"workers-{workers}")
        train_in_processes(task)
        losses.append([record["loss"] for record in read_records(task)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=0)


def test_run_learns_and_leaves_a_model_with_its_metrics_and_curve(folder: Path) -> None:
    task = make_task(folder, make_settings(steps=30, validate_every=10, validation_tokens=100), "finished")
    train_in_processes(task)
    records = read_records(task)
    assert [record["step"] for record in records] == list(range(1, 31))
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert [record["step"] for record in records if "validation_loss" in record] == [10, 20, 30]
    assert abs(records[-1]["validation_loss"] - records[-1]["loss"]) < 0.5
    assert all(record["tokens_per_s"] > 0 and record["mfu"] > 0 and record["max_violation"] >= 0 for record in records)
    assert (Path(task.output) / "curve.png").read_bytes().startswith(b"\x89PNG")
    decoder = load_checkpoint_folder(Path(task.output) / "model", dtype=torch.float32, device="cpu")
    assert decoder.config == task.config
    config = json.loads((Path(task.output) / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert any(bool(buffer.any()) for name, buffer in decoder.named_buffers() if name.endswith("correction_bias"))
