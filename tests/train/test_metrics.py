from pathlib import Path

import torch

from ray_ds.train.metrics import MetricsLog, decode, draw_curve, encode, peak_flops

RECORDS = [{"step": step, "tokens": step * 10, "loss": 5.0 / step, "lr": 0.1} for step in range(1, 6)]


def test_records_come_back_bit_by_bit() -> None:
    records = [{"step": 1, "loss": 0.1 + 0.2, "is_skipped": False}, {"step": 2, "loss": 1e-17}]
    assert decode(encode(records)) == records


def test_live_file_loses_the_steps_that_run_again(tmp_path: Path) -> None:
    file = tmp_path / "work" / "metrics.jsonl"
    log = MetricsLog([], file)
    for record in RECORDS:
        log.append(record)
    assert decode(file.read_text()) == RECORDS
    log.close()
    resumed = MetricsLog(RECORDS[:3], file)
    resumed.append({"step": 4, "loss": 9.0})
    resumed.close()
    assert [record["step"] for record in decode(file.read_text())] == [1, 2, 3, 4]
    assert decode(file.read_text()) == resumed.records


def test_curve_is_a_png_with_and_without_validation() -> None:
    assert draw_curve(RECORDS).startswith(b"\x89PNG\r\n")
    assert draw_curve([*RECORDS, {**RECORDS[-1], "validation_loss": 2.0}]).startswith(b"\x89PNG\r\n")


def test_peak_of_a_cpu_is_what_a_matrix_product_reaches() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None and 1e8 < peak < 1e14
