"""The clean stage on two nodes: what it keeps, drops, sets aside and refuses, and that its bytes stay the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet
from ray.cluster_utils import Cluster

from ray_ds.artifacts import Corpus, StageRun
from ray_ds.config.clean import CleanSettings
from ray_ds.config.settings import as_json
from ray_ds.data.sample_chinese import PARAGRAPHS
from ray_ds.errors import InputError
from ray_ds.stages.clean import clean
from tests.data.raw_files import good_text, jsonl, settings_for
from tests.on_ray.two_nodes import start_cluster

pytestmark = pytest.mark.ray

DIGEST = "0123456789abcdef"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as started:
        yield started


def _run(folder: Path, settings: CleanSettings) -> Corpus:
    run = StageRun(
        step="clean",
        stage="clean",
        stage_version=1,
        kind="Corpus",
        uri=str(folder / "clean" / DIGEST),
        digest=DIGEST,
        settings=as_json(settings),
        inputs=(),
    )
    corpus = clean(settings, run)
    assert isinstance(corpus, Corpus)
    return corpus


def _write_raw(folder: Path) -> str:
    """Write 30 English and 20 Chinese documents, 5 copies, 4 short texts and a broken line, in three files."""
    good = [{"text": good_text(i)} for i in range(30)]
    (folder / "a.jsonl").write_bytes(jsonl(*good, *[{"text": "Short."}] * 4) + b"{broken\n")
    (folder / "b.jsonl").write_bytes(jsonl(*({"text": text} for text in PARAGRAPHS)))
    (folder / "c.jsonl").write_bytes(jsonl(*({"text": f" {record['text'].upper()}\n"} for record in good[:5])))
    return str(folder / "*.jsonl")


def _files(corpus: Corpus) -> dict[str, str]:
    return {info.path: info.sha256 for info in corpus.manifest.files}


def test_documents_are_kept_dropped_and_set_aside(cluster: Cluster, tmp_path: Path) -> None:
    settings = settings_for(_write_raw(tmp_path), unit_bytes=4096, max_quarantined_fraction=0.05)
    corpus = _run(tmp_path / "one", settings)
    documents = corpus.fact("documents")
    assert (documents["in"], documents["kept"], documents["quarantined"]) == (60, 50, 1)
    assert documents["dropped"]["duplicate"] == 5
    assert sum(documents["dropped"].values()) == 9
    assert documents["in"] == documents["kept"] + sum(documents["dropped"].values()) + documents["quarantined"]
    assert corpus.fact("languages") == {"en": 30, "zh": 20}
    tables = [parquet.read_table(corpus.path(path)) for path in _files(corpus) if path.startswith("documents-")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["doc_id"] for row in rows}) == 50
    assert [row["text"] for row in rows[:30]] == [good_text(i) for i in range(30)]
    assert {(row["source"], row["licence"]) for row in rows} == {("test", "CC0-1.0")}
    assert any("<EMAIL>" in row["text"] and "<PHONE>" in row["text"] for row in rows)
    assert corpus.fact("bytes") == sum(len(row["text"].encode()) for row in rows)
    assert json.loads(Path(corpus.path("report.json")).read_text())["counts"]["samples"]

    again = _run(
        tmp_path / "two",
        settings_for(settings.inputs[0].glob, unit_bytes=4096, max_quarantined_fraction=0.05, max_running_units=1),
    )
    assert _files(again) == _files(corpus)


def test_too_much_damage_fails(cluster: Cluster, tmp_path: Path) -> None:
    settings = settings_for(_write_raw(tmp_path))
    expected = (
        r"records in quarantine \(1 of 60: 1 bad_json\) must be at most the share max_quarantined_fraction = 0.001"
    )
    with pytest.raises(InputError, match=expected):
        _run(tmp_path, settings)
    assert not (tmp_path / "clean" / DIGEST / "manifest.json").exists()
    assert parquet.read_table(tmp_path / "clean" / DIGEST / "quarantine" / "00000.parquet").num_rows == 1


def test_nothing_kept_fails(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "Short."}))
    with pytest.raises(InputError, match=r"documents kept \(0 of 1: 1 (too_short|language)\) must be one or more"):
        _run(tmp_path, settings_for(str(tmp_path / "a.jsonl")))


def test_duplicates_stay_where_that_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": good_text(1)}, {"text": good_text(1)}))
    corpus = _run(tmp_path, settings_for(str(tmp_path / "a.jsonl"), exact_duplicates=False))
    assert corpus.fact("documents", "kept") == 2
