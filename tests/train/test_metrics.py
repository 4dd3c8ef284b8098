import logging
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from ray_ds.plan.devices import DEVICE_KINDS
from ray_ds.train.metrics import (
    FIELDS,
    PEAK_TFLOPS,
    SHOWN,
    MetricsLog,
    Work,
    decode,
    draw_curve,
    encode,
    load_figures,
    peak_flops,
    peak_memory,
    restart_tokens,
    summarise,
)

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


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T4", None),
    ],
)
def test_peak_of_a_gpu_is_that_of_its_form_and_an_unknown_one_is_logged(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        peak = peak_flops(torch.device("cuda", 0), torch.bfloat16)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))
    told = f'peak_unknown device="{name}" dtype=bfloat16 reason="so there is no mfu"'
    assert caplog.messages == ([told] if tflops is None else [])
    assert peak_flops(torch.device("cuda", 0), torch.float32) is None


def test_peaks_are_those_that_plans_go_by() -> None:
    for kind in DEVICE_KINDS:
        words = {"a100-80gb": "A100", "a100-40gb": "A100", "rtx4090": "RTX 4090"}.get(kind.name, kind.name.upper())
        assert PEAK_TFLOPS[words] * 1e12 == pytest.approx(kind.peak_flops), kind.name


def test_last_sign_of_an_earlier_process_survives_the_cut_and_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert MetricsLog([], file).last_sign is None
    file.write_text(encode([{"step": 1, "time": 10.5}, {"step": 2, "time": 12.5}]) + '{"step": 3, "ti')
    log = MetricsLog([{"step": 1, "time": 10.5}], file)
    log.close()
    assert log.last_sign == 12.5
    assert decode(file.read_text()) == [{"step": 1, "time": 10.5}]


def test_going_back_drops_later_records_from_the_live_file_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(RECORDS[:4], file)
    log.go_back(2)
    log.append({"step": 3, "loss": 9.0})
    log.close()
    assert decode(file.read_text()) == log.records == [*RECORDS[:2], {"step": 3, "loss": 9.0}]


def test_rate_and_mfu_follow_from_the_duration() -> None:
    work = Work(batch_tokens=1000, flops_per_token=3e6, world_size=2, peak_flops=1e9)
    assert work.figures(7, 2.0) == {
        "step": 7,
        "tokens": 7000,
        "seconds": 2.0,
        "tokens_per_s": 500.0,
        "world_size": 2,
        "mfu": 500 * 3e6 / 2e9,
    }
    unknown = Work(batch_tokens=1000, flops_per_token=3e6, world_size=2, peak_flops=None)
    assert "mfu" not in unknown.figures(7, 2.0)


def test_expert_load_is_told_as_multiples_of_the_layers_mean() -> None:
    load = torch.tensor([[10, 10, 10, 10], [0, 20, 10, 10]])
    assert load_figures(load) == {"max_violation": 1.0, "max_load": 2.0, "min_load": 0.0}
    assert load_figures(torch.zeros(0, 0, dtype=torch.int64)) == {}


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before + 64 * 2**20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= held.numel()


def test_summary_takes_means_the_last_account_and_what_is_known_of_the_model() -> None:
    account = {"goodput": 0.9, "lost_s": 3.0, "restarts": 2}
    records = [{**record, **account, "tokens_per_s": 10.0 * record["step"], "mfu": 0.1} for record in RECORDS]
    records[1]["validation_loss"] = 4.0
    records[3]["validation_loss"] = 4.5
    assert summarise(records, model_step=5)["validation_loss"] == 4.5
    assert summarise(records, model_step=3) == {
        "step": 5,
        "model_step": 3,
        "tokens": 50,
        "train_loss": pytest.approx(sum(5.0 / step for step in range(1, 6)) / 5),
        "validation_loss": 4.0,
        "tokens_per_s": 30.0,
        "mfu": 0.1,
        **account,
    }


def test_what_is_shown_is_measured() -> None:
    assert set(SHOWN) <= set(FIELDS)


def test_curve_marks_restarts_and_shows_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [{**record, "world_size": 2, "restarts": 0} for record in RECORDS]
    for record in workers[3:]:
        record |= {"world_size": 1, "restarts": 2}
    assert restart_tokens(workers) == [30]
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    assert draw_curve(workers).startswith(b"\x89PNG\r\n")
    upper, _, lowest = drawn[0].axes
    assert [line.get_label() for line in upper.lines] == ["training", "restart"]
    assert list(lowest.lines[0].get_ydata()) == [2, 2, 2, 1, 1]
    draw_curve(RECORDS)
    assert len(drawn[1].axes) == 2
