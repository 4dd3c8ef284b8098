import shutil
from pathlib import Path

import pytest

from ray_ds.artifacts import Checkpoint, Corpus, Tokenizer, find_artifact, make_digest, open_artifact
from ray_ds.errors import ArtifactError
from tests.bare_runs import DIGEST, make_run


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    run = make_run(tmp_path, "Corpus")
    folder = tmp_path / DIGEST
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "scratch").write_text("unfinished")
    (folder / "documents-0.parquet").write_bytes(b"0123456789")
    found = run.commit({"documents": {"in": 3}}, seconds=1.5)
    assert isinstance(found, Corpus)
    return found


def test_a_committed_artefact_is_found_with_its_facts(corpus: Corpus) -> None:
    found = open_artifact(corpus.uri, [Corpus])
    assert found == corpus
    assert found.fact("documents", "in") == 3
    assert [info.path for info in found.manifest.files] == ["documents-0.parquet"]
    found.verify_files()


def test_no_manifest_means_unfinished(tmp_path: Path) -> None:
    assert find_artifact(str(tmp_path / DIGEST)) is None
    with pytest.raises(ArtifactError, match=r"\(no manifest\) must be a finished Corpus; run the step that makes it"):
        open_artifact(str(tmp_path / DIGEST), [Corpus])


def test_a_wrong_kind_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ArtifactError, match=r"\(Corpus\) must be a Tokenizer or Checkpoint; name another step"):
        open_artifact(corpus.uri, [Tokenizer, Checkpoint])


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "Corpus"}'])
def test_a_damaged_manifest_is_an_error(corpus: Corpus, damage: str) -> None:
    Path(corpus.uri, "manifest.json").write_text(damage)
    with pytest.raises(
        ArtifactError, match=r"manifest.json \(\d+ bytes\) must be a manifest .*; restore it, or delete"
    ):
        find_artifact(corpus.uri)


def test_an_artefact_of_another_recipe_is_an_error(corpus: Corpus, tmp_path: Path) -> None:
    other = tmp_path / "fedcba9876543210"
    shutil.copytree(corpus.uri, other)
    with pytest.raises(ArtifactError, match=r"must have the digest of its folder.*artefact of another recipe; put it"):
        find_artifact(str(other))


def test_a_cut_file_is_found_by_its_size(corpus: Corpus) -> None:
    Path(corpus.path("documents-0.parquet")).write_bytes(b"01234")
    with pytest.raises(
        ArtifactError, match=r"documents-0.parquet \(5 bytes\) must have 10 bytes, as its manifest says"
    ):
        find_artifact(corpus.uri)


def test_a_missing_file_is_found(corpus: Corpus) -> None:
    Path(corpus.path("documents-0.parquet")).unlink()
    with pytest.raises(ArtifactError, match=r"documents-0.parquet \(missing\) must have 10 bytes"):
        find_artifact(corpus.uri)


@pytest.mark.shows("A damaged artefact is found by size or sha256 before it is used")
def test_a_changed_byte_is_found_by_its_hash(corpus: Corpus) -> None:
    Path(corpus.path("documents-0.parquet")).write_bytes(b"0123456780")
    with pytest.raises(ArtifactError, match=r"documents-0.parquet \(sha256 \w{12}\) must have sha256 \w{12}, as its"):
        corpus.verify_files()


def test_digests_do_not_depend_on_order_of_keys() -> None:
    assert make_digest({"a": 1, "b": [1.5, None]}) == make_digest({"b": [1.5, None], "a": 1})
    assert make_digest({"a": 1}) != make_digest({"a": 2})
