"""The bench of a restart, on made-up times."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.bench.gpu_restart import STAGES, Telling, make_task, parts, read_beats
from ray_ds.train.batches import open_task_rows


def test_parts_of_a_start_add_up_to_the_whole() -> None:
    beats = [{"time": time} for time in (12.0, 15.0, 16.0, 20.0, 39.0)]
    found = parts("warm", 10.0, beats, 39.5)
    assert list(found.values()) == [2.0, 3.0, 1.0, 4.0, 19.0, 0.5]
    assert sum(found.values()) == pytest.approx(29.5) and found["warm_first_pass_s"] == 19.0


def test_the_first_beat_of_each_stage_is_written_down_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    heard: list[str] = []
    host = Telling(cast(Any, SimpleNamespace(beat=heard.append, rank=3)), tmp_path / "run" / "beats.jsonl")
    said = [*STAGES[:2], "step 1 micro-batch 1", "step 1 micro-batch 2", "step 1 gradients", "step 2 micro-batch 1"]
    for place in said:
        host.beat(place)
    assert heard == said and host.rank == 3
    assert [beat["stage"] for beat in read_beats(tmp_path)] == list(STAGES)


def test_the_task_has_shards_to_train_on(tmp_path: Path) -> None:
    options = argparse.Namespace(
        preset="tiny", device="cpu", compile=False, zero_stage=1, rows=4, seq_len=32, vocab_size=512, checkpoint_every=5
    )
    task = make_task(tmp_path, options)
    rows, _ = open_task_rows(task, "train")
    assert sum(rows.shard_rows) >= 4 * 128 and json.loads((tmp_path / "shards" / "tokenizer.json").read_text()) == {}
