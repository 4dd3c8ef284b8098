"""The clean stage on two nodes: what it keeps, drops, sets aside and refuses, and that its bytes stay the same.

Killed work resumes: a worker, a node or the job gets SIGKILL in the middle of cleaning.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from pyarrow import parquet
from ray.cluster_utils import Cluster

from ray_ds.artifacts import Corpus
from ray_ds.config.clean import CleanSettings
from ray_ds.config.settings import as_json
from ray_ds.data.sample_chinese import PARAGRAPHS
from ray_ds.data.sample_text import king_james_chapters
from ray_ds.errors import InputError
from ray_ds.stage_run import StageRun
from ray_ds.stages.clean import clean
from tests.data.raw_files import good_text, jsonl, settings_for
from tests.on_ray.two_nodes import (
    add_node,
    committed_units,
    raylet_pid,
    read_attempts,
    start_cluster,
    stopped_in_a_unit,
    wait_for,
)

pytestmark = pytest.mark.ray

DIGEST = "0123456789abcdef"
WORK = Path("clean", DIGEST, "work", "clean")


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
        run_dir=str(folder),
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


@pytest.fixture(scope="module")
def chapters(tmp_path_factory: pytest.TempPathFactory) -> CleanSettings:
    """Write half of the King James text, with damaged lines and copies in it, and return settings: twelve units."""
    lines = [jsonl(chapter) for chapter in king_james_chapters()][::2]
    lines[::60] = [line + b"{broken\n" for line in lines[::60]]
    folder = tmp_path_factory.mktemp("chapters")
    (folder / "a.jsonl").write_bytes(b"".join(lines + lines[1:40:2]))
    return _chapters_in(folder)


def _chapters_in(folder: Path) -> CleanSettings:
    return settings_for(str(folder / "*.jsonl"), unit_bytes=200_000, max_quarantined_fraction=0.05)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, chapters: CleanSettings, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("undisturbed")
    corpus = _run(folder, chapters)
    assert corpus.fact("documents", "quarantined") == 10 and corpus.fact("documents", "dropped", "duplicate") == 20
    assert set(Counter(attempt["unit"] for attempt in read_attempts(folder / WORK)).values()) == {1}
    assert len(committed_units(folder / WORK)) == 12
    return corpus


def _kill_midway(folder: Path, find_pid: Callable[[str, int], int]) -> tuple[str, set[str]]:
    """Kill the process that `find_pid` names by the node and process id of a worker that is stopped in a unit.

    The worker goes on afterwards where it was not the one to be killed.

    Returns: the worker's unit, and the units that were committed by then.
    """
    with stopped_in_a_unit(folder / WORK) as attempt:
        wait_for(lambda: len(committed_units(folder / WORK)) >= 3)
        committed = committed_units(folder / WORK)
        assert attempt["unit"] not in committed
        os.kill(find_pid(attempt["node_id"], attempt["pid"]), signal.SIGKILL)
    return attempt["unit"], committed


def _run_and_kill(folder: Path, settings: CleanSettings, find_pid: Callable[[str, int], int]) -> tuple[Corpus, str]:
    """Clean, and kill as `_kill_midway` does; return what comes of it all the same, and the unit that was hit."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(_run, folder, settings)
        unit, committed = _kill_midway(folder, find_pid)
        corpus = running.result(timeout=120)
    _assert_not_repeated(folder, committed)
    return corpus, unit


def _assert_not_repeated(folder: Path, committed: set[str]) -> None:
    attempts = Counter(attempt["unit"] for attempt in read_attempts(folder / WORK))
    assert {unit: attempts[unit] for unit in committed} == dict.fromkeys(committed, 1)


def _assert_same(corpus: Corpus, undisturbed: Corpus) -> None:
    assert _files(corpus) == _files(undisturbed)
    assert corpus.manifest.facts == undisturbed.manifest.facts
    corpus.verify_files()


@pytest.mark.slow
@pytest.mark.shows("Cleaning survives SIGKILL of a worker or a node: same bytes, committed work is not redone")
def test_a_killed_worker_changes_no_byte(
    cluster: Cluster, chapters: CleanSettings, undisturbed: Corpus, tmp_path: Path
) -> None:
    corpus, unit = _run_and_kill(tmp_path, chapters, lambda node_id, pid: pid)
    _assert_same(corpus, undisturbed)
    attempts = Counter(attempt["unit"] for attempt in read_attempts(tmp_path / WORK))
    assert {name for name, count in attempts.items() if count > 1} == {unit}


@pytest.mark.slow
@pytest.mark.shows("Cleaning survives SIGKILL of a worker or a node: same bytes, committed work is not redone")
def test_a_killed_raylet_changes_no_byte(
    cluster: Cluster, chapters: CleanSettings, undisturbed: Corpus, tmp_path: Path
) -> None:
    """Its busy worker, an orphan, still commits its unit, and dies when it returns that; the repeated task finds it."""
    try:
        corpus, _ = _run_and_kill(tmp_path, chapters, lambda node_id, pid: raylet_pid(cluster, node_id))
    finally:
        add_node(cluster)
    _assert_same(corpus, undisturbed)


def run_job(address: str, folder: str, raw: str) -> None:
    """Clean as a job does: in a process of its own that connects to the cluster."""
    ray.init(address=address, log_to_driver=False)
    _run(Path(folder), _chapters_in(Path(raw)))


@pytest.mark.slow
@pytest.mark.shows("A killed cleaning job, run again, does only what is not committed: same bytes")
def test_a_killed_job_goes_on_when_run_again(
    cluster: Cluster, chapters: CleanSettings, undisturbed: Corpus, tmp_path: Path
) -> None:
    raw = Path(chapters.inputs[0].glob).parent
    code = f"from tests.stages.test_clean import run_job; run_job({cluster.address!r}, {str(tmp_path)!r}, {str(raw)!r})"
    job = subprocess.Popen([sys.executable, "-c", code])
    try:
        _, committed = _kill_midway(tmp_path, lambda node_id, pid: job.pid)
        assert job.wait(timeout=60) == -signal.SIGKILL
    finally:
        job.kill()
    assert not (tmp_path / "clean" / DIGEST / "manifest.json").exists()
    _assert_same(_run(tmp_path, chapters), undisturbed)
    _assert_not_repeated(tmp_path, committed)
