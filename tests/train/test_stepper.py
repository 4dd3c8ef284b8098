"""Running ahead: a step's first micro-batch is launched before the step before was read; no figure may tell."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from ray_ds.train.checkpoints import find_latest
from ray_ds.train.host import Request
from ray_ds.train.stepper import may_run_ahead
from tests.train.runs import curve, make_settings, make_task, read_records, train_in_processes

RUN: dict[str, Any] = {"steps": 11, "validate_every": 4, "validation_tokens": 100}
KINDS = {
    "experts, ZeRO 1": {"zero_stage": 1, "precision": "bf16"},
    "Muon, ZeRO 2, one micro-batch a worker": {
        "zero_stage": 2,
        "micro_batch": 8,
        "optimizer": {"kind": "muon", "lr": 1e-2, "adam_lr": 1e-3},
        "gradient_clipping": 0.0,
    },
    "ZeRO 3": {"zero_stage": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_running_ahead_changes_no_bit(tmp_path: Path, kind: str) -> None:
    settings = make_settings(**RUN, **KINDS[kind])
    plain, ahead, broken = (make_task(tmp_path, settings, name) for name in ("plain", "ahead", "broken"))
    train_in_processes(plain)
    train_in_processes(ahead, runs_ahead=True)
    # Stopped with a micro-batch of step 6 on its way, then killed with one of step 9.
    train_in_processes(broken, runs_ahead=True, requests={5: Request.STOP})
    commit = find_latest(broken.checkpoints)
    assert commit is not None and (commit.step, commit.extra["cursor"]) == (5, 5)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train_in_processes(broken, runs_ahead=True, die_at_step=8)
    train_in_processes(broken, runs_ahead=True)
    weights = "model/model.safetensors"
    expected = (Path(plain.output) / weights).read_bytes()
    for task in (ahead, broken):
        assert curve(read_records(task)) == curve(read_records(plain))
        assert (Path(task.output) / weights).read_bytes() == expected


def test_it_does_not_run_ahead_of_what_may_be_undone_or_would_change_what_is_kept() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    muon = {"optimizer": {"kind": "muon", "lr": 1e-2, "adam_lr": 1e-3}, "gradient_clipping": 0.0}
    assert may_run_ahead(make_settings(), gpu) and may_run_ahead(make_settings(zero_stage=2, **muon), gpu)
    assert not may_run_ahead(make_settings(), cpu)
    for other in ({"bad_loss": "skip"}, {"offload": "optimizer"}, {"zero_stage": 3, **muon}):
        assert not may_run_ahead(make_settings(**other), gpu), other
