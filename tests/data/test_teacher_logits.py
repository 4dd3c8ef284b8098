"""Stored logits: what is read for a row is what was said to it, and nothing else is taken for it."""

from pathlib import Path

import numpy as np
import pytest

from ray_ds.data.rows import Rows, open_rows
from ray_ds.data.shards import TokenSplit
from ray_ds.data.stored_rows import RowRange, plan_ranges
from ray_ds.data.teacher_logits import open_logits
from ray_ds.errors import ArtifactError
from tests.data.made_up_logits import said_to, store_made_up
from tests.train.runs import write_shards

SEQ_LEN = 16


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    write_shards(tmp_path / "shards")
    return open_rows(TokenSplit.open(str(tmp_path / "shards"), "train"), "stream", SEQ_LEN)


def test_files_cover_each_shards_rows_once() -> None:
    ranges = plan_ranges("train", [5, 0, 3], 2)
    assert [(part.shard, part.first, part.stop) for part in ranges] == [
        (0, 0, 2), (0, 2, 4), (0, 4, 5), (2, 5, 7), (2, 7, 8),
    ]  # fmt: skip
    assert ranges[1] == RowRange(split="train", shard=0, place=1, first=2, stop=4)
    assert [part.file for part in ranges][2:4] == ["00000-00002.arrow", "00002-00000.arrow"]


def test_a_row_has_what_was_said_to_it(tmp_path: Path, rows: Rows) -> None:
    stored = open_logits(store_made_up(tmp_path, {"train": rows}), "train", rows)
    for index in range(sum(rows.shard_rows)):
        row = rows.row(index)
        for found, expected in zip(stored.row(index, row), said_to(row), strict=True):
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert not any(values.any() for values in stored.blank(2))


@pytest.mark.shows("Logits stored for other rows, or for rows in another order, are refused")
def test_logits_of_other_rows_are_refused(tmp_path: Path, rows: Rows) -> None:
    artifact = store_made_up(tmp_path, {"train": rows})
    stored = open_logits(artifact, "train", rows)
    with pytest.raises(ArtifactError, match=r"\(row 4 of train\) must have been of the same tokens; run step teacherl"):
        stored.row(4, rows.row(5))
    fewer = open_rows(rows.split, "stream", SEQ_LEN * 2)
    with pytest.raises(ArtifactError, match=r"\(102 rows\) must have 50, those of the shards; run step teacherlogits"):
        open_logits(artifact, "train", fewer)


def test_a_damaged_file_is_named(tmp_path: Path, rows: Rows) -> None:
    artifact = store_made_up(tmp_path, {"train": rows})
    path = Path(artifact.path("train", "00001-00000.arrow"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stored = open_logits(artifact, "train", rows)
    first = rows.shard_rows[0]
    with pytest.raises(ArtifactError, match=r"00001-00000.arrow \(.*\) must be one record batch of ids, logits, log_"):
        stored.row(first, rows.row(first))
