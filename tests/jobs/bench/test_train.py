"""The training bench: what it makes of records, and the settings it measures."""

import json
import math

import pytest

from jobs.bench import train
from jobs.bench.train import format_peer, format_row, make_settings, summarize
from jobs.bench.train_peers import PEERS, Peer, run_peer


def records(count: int = 20, **figures: float) -> list[dict[str, float]]:
    """Return records whose first half is slow."""
    return [
        {
            "step": step,
            "loss": 10.0 / step,
            "seconds": 4.0 if step <= count // 2 else 1.0,
            "tokens_per_s": 25.0 if step <= count // 2 else 100.0,
            "memory_bytes": 1000 + step,
            **figures,
        }
        for step in range(1, count + 1)
    ]


def test_warm_steps_alone_count_for_speed_and_all_for_the_rest() -> None:
    made = records(mfu=0.4, loss_scale=512.0)
    made[0]["is_skipped"] = True
    made[15]["checkpoint_s"] = 0.02
    found = summarize(made)
    assert (found["tokens_per_s"], found["step_s"], found["mfu"]) == (100.0, 1.0, 0.4)
    assert (found["first_loss"], found["memory_bytes"], found["skipped_steps"]) == (10.0, 1020, 1)
    assert found["final_loss"] == pytest.approx(sum(10 / step for step in range(11, 21)) / 10)
    assert found["checkpoint_stall_of_a_step"] == pytest.approx(0.02)
    assert "snapshot_s" not in found


def test_lines_say_what_was_measured() -> None:
    row = {"precision": "fp16", "zero_stage": 2, **summarize(records(mfu=0.4, loss_scale=512.0))}
    assert "fp16  ZeRO 2" in format_row(row) and "40.0 % MFU" in format_row(row) and "scale 512" in format_row(row)
    unknown = {**row, **summarize(records())}
    assert "MFU" not in format_row(unknown) and "scale" not in format_row(unknown)
    assert format_peer({**row, "bare_loop_tokens_per_s": 125.0}, "bare_loop").endswith("ours is 80.0%")


def test_settings_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--model", "tiny", "--seq-len", "64", "--batch-rows", "32", "--micro-batch", "8", "--steps", "16"]
    monkeypatch.setattr("sys.argv", words)
    options = train.parse_options()
    settings = make_settings(options, "bf16", 2, "cpu")
    assert (settings.precision, settings.zero_stage, settings.num_micro_batches) == ("bf16", 2, 4)
    assert settings.checkpoint_every == settings.num_steps == 16 and settings.snapshot_every == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_each_peer_trains_the_same_tiny_model_in_a_process_of_its_own(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "tiny", "--seq-len", "16", "--batch-rows", "8", "--micro-batch", "4", "--vocab-size", "300"]
    monkeypatch.setattr("sys.argv", ["train", *words, "--steps", "5"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = train.parse_options()
    found = run_peer(peer, make_settings(options, "bf16", 2, "cpu"), options)
    assert found.keys() == {f"{peer.__name__}_tokens_per_s"}
    assert 0 < found[f"{peer.__name__}_tokens_per_s"] < math.inf


def test_the_last_line_names_every_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"bare_engine": 101.0, "stock_deepspeed": 80.0, "bare_loop": 125.0}
    monkeypatch.setattr("sys.argv", ["train", "--model", "tiny", "--precisions", "bf16", "fp16", "--zero-stages", "1"])
    monkeypatch.setattr(train, "write_synthetic_shards", lambda folder, options: None)
    monkeypatch.setattr(train, "run_ours", lambda folder, settings, options: summarize(records()))
    monkeypatch.setattr(
        train,
        "run_peer",
        lambda peer, settings, options: {f"{peer.__name__}_tokens_per_s": speeds[peer.__name__]},
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    train.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["name"] == "train" and set(found) == {"name", "inputs", "figures", "peers"}
    expected = {f"{name}_tokens_per_s": speed for name, speed in speeds.items()}
    assert found["peers"] == [expected, {name: expected[name] for name in expected if not name.startswith("bare_loop")}]
    assert all(row["tokens_per_s"] == 100.0 for row in found["figures"])
    assert sum("stock deepspeed" in line and line.endswith("ours is 125.0%") for line in table) == 2
