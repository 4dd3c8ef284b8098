"""Asking a model about shards on an object store."""

import tempfile
from functools import partial
from pathlib import Path

import pytest

from ray_ds.data.stored_rows import RowRange
from ray_ds.train.ask_rows import RowJob, store_range
from ray_ds.train.teacher import ask_teacher
from tests.data.fake_store import installed_store, put_shards
from tests.train.chats import new_checkpoint
from tests.train.runs import VOCAB_SIZE
from tests.train.teachers import logits_settings


@pytest.mark.parametrize(("cache_bytes", "kept"), [(1, 1), (1 << 30, 6)])
def test_shards_take_no_more_disk_than_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, kept: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    new_checkpoint(tmp_path / "teacher")
    with installed_store(tmp_path) as store:
        settings = logits_settings(shard_cache_bytes=cache_bytes)
        job = RowJob(
            settings=settings,
            ask=partial(ask_teacher, settings=settings, vocab_size=VOCAB_SIZE, bos_token_id=0),
            checkpoint=str(tmp_path / "teacher"),
            shards=put_shards(store, num_shards=6, tokens=100),
            rows="stream",
            device="cpu",
        )
        files: list[str] = []
        for shard in range(6):
            part = RowRange(split="train", shard=shard, place=0, first=6 * shard, stop=6 * shard + 6)
            store_range(part, lambda path, data: files.append(path), job)
    assert len(set(files)) == 6
    assert len(list((tmp_path / "node").rglob("*.arrow"))) == kept
