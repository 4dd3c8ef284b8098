"""The sample text is complete and the same every time."""

import gzip
import json
from pathlib import Path

import pytest

from ray_ds.data import sample_text
from ray_ds.data.sample_text import king_james_chapters, write_sample_text

PACKAGES_BYTES = 300_000


def test_the_king_james_text_is_whole() -> None:
    chapters = list(king_james_chapters())
    assert len(chapters) == 1189
    assert chapters[0]["text"].startswith("Genesis 1\n\nIn the beginning God created the heaven and the earth.")
    assert chapters[-1]["text"].endswith("Amen.")


def test_the_files_are_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_text, "MAX_PACKAGES_BYTES", PACKAGES_BYTES)
    counts = write_sample_text(str(tmp_path / "a"))
    write_sample_text(str(tmp_path / "b"))
    for name, count in counts.items():
        data = (tmp_path / "a" / f"{name}.jsonl.gz").read_bytes()
        assert data == (tmp_path / "b" / f"{name}.jsonl.gz").read_bytes()
        documents = [json.loads(line) for line in gzip.decompress(data).splitlines()]
        assert len(documents) == count
        assert all(set(document) == {"id", "text", "source", "licence"} for document in documents)
        assert len({document["id"] for document in documents}) == count
        if name == "packages":
            assert sum(len(document["text"].encode()) for document in documents) <= PACKAGES_BYTES
