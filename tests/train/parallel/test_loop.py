"""The whole loop in groups: rows, losses, loads, validation and checkpoints are those of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import make_settings, make_task, read_records, train_in_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = {"preset": "tiny", "num_attention_heads": 4, "num_nextn_predict_layers": 1}
FIGURES = ("loss", "grad_norm", "prediction_loss", "balance_loss", "max_violation", "validation_loss")


def settings_of(**changes: Any) -> Any:
    rates = {"optimizer": {"kind": "adamw", "lr": 1e-3}, "validate_every": 4, "document_mask": True}
    return make_settings(**{"model": MODEL, **rates, "validation_tokens": 128, **changes})


@pytest.mark.shows(
    "A run broken off in an expert group goes on offloaded in a sequence group; the curve is one process's"
)
def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    alone = make_task(tmp_path, settings_of(num_workers=1), "alone")
    train_in_processes(alone)
    experts = make_task(tmp_path, settings_of(parallel={"expert": 2}, zero_stage=2), "moved")
    with pytest.raises(Exception, match="SIGKILL"):
        train_in_processes(experts, die_at_step=5)
    rows = settings_of(parallel={"sequence": 2}, zero_stage=3, offload="all")
    moved = make_task(tmp_path, rows, "moved")
    train_in_processes(moved)
    expected, found = read_records(alone), read_records(moved)
    assert [record["step"] for record in found] == list(range(1, 9))
    for one, other in zip(expected, found, strict=True):
        figures = {name: one[name] for name in FIGURES if name in one}
        assert {name: other[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert "validation_loss" in found[3] and "validation_loss" in found[7]


def test_a_tensor_group_counts_its_rows_once(tmp_path: Path) -> None:
    dense = {"preset": "tiny", "n_routed_experts": 0, "num_attention_heads": 4, "num_nextn_predict_layers": 1}
    alone = make_task(tmp_path, settings_of(model=dense, num_workers=1), "alone")
    group = make_task(tmp_path, settings_of(model=dense, parallel={"tensor": 2}, zero_stage=2), "group")
    for task in (alone, group):
        train_in_processes(task)
    for one, other in zip(read_records(alone), read_records(group), strict=True):
        figures = {name: one[name] for name in FIGURES if name in one}
        assert {name: other[name] for name in figures} == pytest.approx(figures, rel=1e-5)
