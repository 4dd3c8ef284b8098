"""Small finished artefacts for tests of stages."""

import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ds import storage
from ray_ds.artifacts import Artifact, Corpus, make_digest
from ray_ds.stage_run import StageRun
from tests.data.raw_files import jsonl, read_bytes

OPENING = "in the beginning God created heaven and earth without form, void; darkness upon the face of the deep\n"
WORDS = [*OPENING.split(" "), "起初", "神创造", "天地", "1611", "it's", "light."]


def stage_run(folder: Path, kind: str, *inputs: Artifact, name: str = "a") -> StageRun:
    """Return a run that makes an artefact of `kind` below `folder`."""
    digest = make_digest([kind, name])
    return StageRun(
        step=kind.lower(),
        stage=kind.lower(),
        stage_version=1,
        kind=kind,
        run_dir=str(folder),
        uri=f"{folder}/{kind.lower()}/{digest}",
        digest=digest,
        settings={},
        inputs=inputs,
    )


def book_texts(num_books: int, num_chapters: int, num_words: int = 60) -> dict[str, str]:
    """Return doc_id -> text of chapters, read from a file that calls them `book3/7`; the same ones every time."""
    rng = random.Random(0)
    chapters = [
        {"id": f"book{book}/{chapter}", "text": " ".join(rng.choices(WORDS, k=num_words))}
        for book in range(num_books)
        for chapter in range(num_chapters)
    ]
    with TemporaryDirectory() as folder:
        records = read_bytes(Path(folder), "books.jsonl", jsonl(*chapters), id_column="id")
    return {record.doc_id: record.text or "" for record in records}


def make_corpus(folder: Path, texts: Mapping[str, str], *, num_files: int = 3, name: str = "a") -> Corpus:
    """Return a corpus of texts by doc_id."""
    run = stage_run(folder, "Corpus", name=name)
    rows = list(texts.items())
    for i in range(num_files):
        part = rows[i * len(rows) // num_files : (i + 1) * len(rows) // num_files]
        columns = {"doc_id": [row[0] for row in part], "text": pa.array([row[1] for row in part], pa.large_string())}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        storage.write_bytes(run.path(f"documents-{i:05d}.parquet"), sink.getvalue())
    facts: dict[str, Any] = {
        "documents": {"in": len(rows), "kept": len(rows), "dropped": {}, "quarantined": 0},
        "bytes": sum(len(text.encode()) for text in texts.values()),
    }
    corpus = run.commit(facts, seconds=0.0)
    assert isinstance(corpus, Corpus)
    return corpus


def flip_byte(artifact: Artifact) -> Path:
    """Change a byte in the middle of an artefact's first file, and return that file."""
    path = Path(artifact.path(artifact.manifest.files[0].path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path
