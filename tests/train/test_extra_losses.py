"""What the loop does with losses beside the cross-entropy, and with documents of a row."""

from pathlib import Path

import pytest

from tests.train.runs import make_settings, make_task, read_records, train_in_processes

AHEAD = {"preset": "tiny", "num_nextn_predict_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_extra_losses_are_shown_apart_from_the_loss(tmp_path: Path, zero_stage: int) -> None:
    settings = make_settings(
        model=AHEAD, steps=4, document_mask=True, balance_weight=0.5, zero_stage=zero_stage, num_workers=1
    )
    train_in_processes(make_task(tmp_path, settings))
    records = read_records(make_task(tmp_path, settings))
    # Untrained, each token costs ln 300 = 5.7 nats, and a layer with experts adds about 1 to the balance.
    assert records[0]["loss"] == pytest.approx(5.7, abs=0.1)
    assert 4.5 < records[0]["prediction_loss"] < 5.7  # of the last place of a row and of a document there is none
    assert 1.9 < records[0]["balance_loss"] < 3.0
    assert records[-1]["prediction_loss"] < records[0]["prediction_loss"]
