"""Training through products in FP8, on a CPU, which has them too."""

from pathlib import Path

import pytest
import torch

from ray_ds.model.fp8 import Fp8Linear
from ray_ds.train.start import make_objective
from tests.train.runs import make_settings, make_task, read_records, train_in_processes

BF16 = {"precision": "bf16", "steps": 40, "num_workers": 1, "checkpoint_every": 40}


@pytest.mark.shows("FP8 products train a model as bf16 does, under the same names")
def test_losses_are_those_of_bf16(tmp_path: Path) -> None:
    plain = make_task(tmp_path, make_settings(**BF16), "bf16")
    fp8 = make_task(tmp_path, make_settings(**BF16, fp8=True), "fp8")
    objective = make_objective(fp8, torch.device("cpu"))
    assert sum(isinstance(module, Fp8Linear) for module in objective.decoder.modules()) > 10
    assert (
        objective.decoder.state_dict().keys() == make_objective(plain, torch.device("cpu")).decoder.state_dict().keys()
    )
    for task in (plain, fp8):
        train_in_processes(task)
    first, last = ([record["loss"] for record in read_records(task)] for task in (plain, fp8))
    assert first != last and first[-1] < first[0] - 1
    assert last[-1] == pytest.approx(first[-1], rel=0.03)
    assert last[0] == pytest.approx(first[0], rel=0.01)
