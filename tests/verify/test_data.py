"""The made-up inputs are the same every time, and artefacts that differ are named with their files."""

from pathlib import Path
from typing import Any

from ray_ds.data.shards import TokenSplit
from ray_ds.verify.data import judge_same
from ray_ds.verify.made_up import write_shards, write_text
from tests.stages.small_artifacts import book_texts, make_corpus


def test_artefacts_with_other_bytes_are_named_with_their_files(tmp_path: Path) -> None:
    texts = book_texts(2, 4)
    one: list[Any] = [make_corpus(tmp_path / "one", texts)]
    assert judge_same(one, [make_corpus(tmp_path / "again", texts)]) == []
    name = next(iter(texts))
    (problem,) = judge_same(one, [make_corpus(tmp_path / "other", {**texts, name: "other"})])
    assert "Corpus made on one CPU and on all of them differ: documents-00000.parquet" in problem.wrong


def test_made_up_text_is_the_same_every_time(tmp_path: Path) -> None:
    assert write_text(str(tmp_path / "a")) == write_text(str(tmp_path / "b")) > 50
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_made_up_shards_have_rows_to_train_on(tmp_path: Path) -> None:
    vocab_size = write_shards(str(tmp_path))
    for split in ("train", "validation"):
        opened = TokenSplit.open(str(tmp_path), split)  # type: ignore[arg-type]
        assert opened.num_rows(128) >= 16 and opened.num_shards == 2
        assert all(int(document.max()) < vocab_size and document[0] == 0 for document in opened.documents())
