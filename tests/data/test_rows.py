from pathlib import Path

import numpy as np
import pytest

from ray_ds.data.rows import NO_TARGET, PackedRows, StreamRows, check_any_row
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import InputError
from tests.train.chats import write_chats


@pytest.mark.shows("Conversations are packed into rows whole, and only the answers' tokens are targets")
@pytest.mark.parametrize(("kind", "per_item"), [("chat", 1), ("preference", 2)])
def test_packed_rows_hold_every_document_once_and_whole(tmp_path: Path, kind: str, per_item: int) -> None:
    write_chats(tmp_path, kind)
    split = TokenSplit.open(str(tmp_path), "train")
    rows = PackedRows(split, 16, documents_per_item=per_item)
    found, num_terms = [], 0
    for index in range(sum(rows.shard_rows)):
        row = rows.row(index)
        documents = []
        assert row.segments is not None and (np.diff(row.segments) >= 0).all()
        last = int(row.segments[-1])
        for number in range(last + 1):
            place = row.segments == number
            targets, tokens = row.targets[place], row.tokens[place]
            if (targets != NO_TARGET).any():
                documents.append((*tokens.tolist(), int(targets[-1])))
                known = targets != NO_TARGET
                assert (targets[known] == np.append(tokens[1:], targets[-1])[known]).all()
        assert len(documents) % per_item == 0
        found += [tuple(documents[i : i + per_item]) for i in range(0, len(documents), per_item)]
        expected = len(documents) // 2 if kind == "preference" else int((row.targets != NO_TARGET).sum())
        assert rows.terms(index) == expected
        num_terms += rows.terms(index)
    whole = [tuple(document.tolist()) for document in split.documents()]
    items = [tuple(whole[i : i + per_item]) for i in range(0, len(whole), per_item)]
    fits = [item for item in items if sum(len(document) - 1 for document in item) <= 16]
    assert sorted(found) == sorted(fits) and rows.num_dropped == len(items) - len(fits)
    masks = sum(int(split.shard(shard).num_targets.sum()) for shard in range(2))
    assert num_terms == (len(fits) if kind == "preference" else masks - 0)
    with pytest.raises(IndexError):
        rows.row(sum(rows.shard_rows))


def test_streams_are_full_of_targets(tmp_path: Path) -> None:
    write_chats(tmp_path, "chat")
    rows = StreamRows(TokenSplit.open(str(tmp_path), "train"), 16)
    row = rows.row(1)
    assert row.segments is None and (row.targets[:-1] == row.tokens[1:]).all() and rows.terms(1) == 16


def test_rows_that_no_conversation_fits_are_refused(tmp_path: Path) -> None:
    write_chats(tmp_path, "chat")
    rows = PackedRows(TokenSplit.open(str(tmp_path), "train"), 1, documents_per_item=1)
    with pytest.raises(InputError, match=r"train \(all 80 of its conversations are longer\) must have one of at most"):
        check_any_row(rows, "train", 1)
