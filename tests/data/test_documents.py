"""Documents are chosen by hash: at random, for good, and independently for each purpose."""

from pathlib import Path

import numpy as np
import pytest

from ray_ds.data.documents import file_names, group_of, hash_fraction, identity_of, read_documents
from ray_ds.errors import ArtifactError
from tests.stages.small_artifacts import make_corpus

KEYS = [f"doc{i}" for i in range(20_000)]


def test_hash_is_uniform_and_independent_of_purpose_and_seed() -> None:
    a, b, c = ([hash_fraction(k, p, s) for k in KEYS] for p, s in (("x", 0), ("y", 0), ("x", 1)))
    assert abs(np.mean(a) - 0.5) < 0.01 and min(a) >= 0 and max(a) < 1
    assert np.abs(np.histogram(a, bins=20, range=(0, 1))[0] - 1000).max() < 150
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02 and abs(np.corrcoef(a, c)[0, 1]) < 0.02


def test_hash_stays_what_it_was() -> None:
    """A changed hash would move validation text into training."""
    assert hash_fraction("kjv:Genesis:1", "validation", 0) == 0.7777782881132205


@pytest.mark.parametrize(
    ("doc_id", "group"),
    [
        ("0123456789ab-7:kjv/Genesis/3", "kjv/Genesis"),
        ("0123456789ab-8:kjv/Genesis/4", "kjv/Genesis"),
        ("0123456789ab.1-0:a:b", "a"),
        ("0123456789ab-0:a/b:c", "a/b"),
        ("0123456789ab-0:alone", "alone"),
        ("0123456789ab-0:a\n/b", "a\n"),
        ("0123456789ab-0", None),
        ("0123456789ab.1-0", None),
        ("0123456789ab:4096", None),
    ],
)
def test_group_is_what_comes_before_the_last_separator(doc_id: str, group: str | None) -> None:
    assert group_of(doc_id) == group


def test_documents_are_read_in_order(tmp_path: Path) -> None:
    texts = {f"d:{i}": f"text {i} 你好" for i in range(700)}
    corpus = make_corpus(tmp_path, texts, num_files=2)
    assert file_names(corpus) == ["00000", "00001"]
    read = [pair for name in file_names(corpus) for batch in read_documents(corpus.uri, name) for pair in batch]
    assert read == list(texts.items())


def test_damaged_file_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": "b"}, num_files=1)
    Path(corpus.path("documents-00000.parquet")).write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"documents-00000.parquet \(.*must be a parquet file with doc_id and text"):
        list(read_documents(corpus.uri, "00000"))


def test_the_parts_of_a_document_are_one() -> None:
    assert (
        identity_of("0123456789ab-3:kjv/Ruth/1")
        == identity_of("0123456789ab-9:kjv/Ruth/1")
        == "0123456789ab:kjv/Ruth/1"
    )
    assert identity_of("0123456789ab-3") == "0123456789ab-3"
