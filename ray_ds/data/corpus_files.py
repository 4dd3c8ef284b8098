"""From the parts that work units left to the files of a corpus: plan, write without duplicates, sum up."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.data.clean_text import DOCUMENTS, Publish, to_parquet
from ray_ds.data.counts import Counts, LostRecordsError
from ray_ds.data.filters import DUPLICATE


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Kept documents of one work unit: `<path>.parquet` and `<path>.keys` below the artefact's folder."""

    path: str
    num_rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """A file of the corpus to be, and what to make it from."""

    index: int
    parts: tuple[Part, ...]
    removed: tuple[bytes, ...]
    """For each part, which rows are duplicates: a bit a row."""

    @property
    def name(self) -> str:
        """Return the file's number, padded so that names sort as numbers do."""
        return f"{self.index:05d}"

    @property
    def input_hash(self) -> str:
        """Return 16 hexadecimal digits that stand for the parts and the rows to leave out."""
        digest = hashlib.sha256()
        for part, removed in zip(self.parts, self.removed, strict=True):
            digest.update(f"{part.path}:{part.num_rows}:{part.bytes}:{removed.hex()}\n".encode())
        return digest.hexdigest()[:16]


_PARTS = pydantic.TypeAdapter(list[Part])


def decode_parts(value: JsonValue) -> list[Part]:
    """Return the parts that `clean_unit` says it left."""
    return _PARTS.validate_python(value)


def plan_corpus(
    parts: Sequence[Part], duplicates: Sequence[NDArray[np.bool_]], file_bytes: int
) -> tuple[CorpusFile, ...]:
    """Group parts, in order, into files of about `file_bytes` of text.

    Args:
        duplicates: for each part, which rows to leave out.
    """
    files: list[CorpusFile] = []
    waiting: list[tuple[Part, bytes]] = []
    waiting_bytes = 0.0

    def close_file() -> None:
        chosen, removed = zip(*waiting, strict=True)
        files.append(CorpusFile(index=len(files), parts=chosen, removed=removed))

    for part, mask in zip(parts, duplicates, strict=True):
        kept_bytes = part.bytes * (1 - float(mask.mean()))
        if waiting_bytes > 0 and kept_bytes > 0 and waiting_bytes + kept_bytes > file_bytes:
            close_file()
            waiting, waiting_bytes = [], 0.0
        waiting.append((part, np.packbits(mask).tobytes()))
        waiting_bytes += kept_bytes
    if waiting_bytes > 0:
        close_file()
    return tuple(files)


def write_corpus_file(file: CorpusFile, publish: Publish, *, root: str) -> dict[str, JsonValue]:
    """Publish `documents-<name>.parquet` and return what it holds, counted."""
    kept: list[pa.Table] = []
    dropped_languages: Counter[str] = Counter()
    for part, removed in zip(file.parts, file.removed, strict=True):
        system, path = storage.filesystem(storage.join(root, f"{part.path}.parquet"))
        table = parquet.read_table(path, filesystem=system, schema=DOCUMENTS)
        is_removed = np.unpackbits(np.frombuffer(removed, dtype=np.uint8), count=part.num_rows).astype(bool)
        kept.append(table.filter(pa.array(~is_removed)))
        dropped_languages.update(table.filter(pa.array(is_removed)).column("language").to_pylist())
    documents = pa.concat_tables(kept)
    publish(f"documents-{file.name}.parquet", to_parquet(documents))
    return {"documents": count_documents(documents), "duplicate_languages": dict(sorted(dropped_languages.items()))}


def count_documents(documents: pa.Table) -> JsonValue:
    """Return rows, bytes of text, languages and sources of a table of documents."""
    sources: dict[tuple[str, str], list[int]] = {}
    languages: Counter[str] = Counter()
    total = 0
    sizes = pc.binary_length(documents.column("text")).to_pylist()
    columns = (documents.column(name).to_pylist() for name in ("source", "licence", "language"))
    for size, source, licence, language in zip(sizes, *columns, strict=True):
        entry = sources.setdefault((source, licence), [0, 0])
        entry[0] += 1
        entry[1] += size
        languages[language] += 1
        total += size
    return {
        "num_rows": documents.num_rows,
        "bytes": total,
        "languages": dict(sorted(languages.items())),
        "sources": [
            {"source": source, "licence": licence, "documents": entry[0], "bytes": entry[1]}
            for (source, licence), entry in sorted(sources.items())
        ],
    }


def summarise(counts: Counts, written: Sequence[dict[str, Any]], num_duplicates: int) -> dict[str, JsonValue]:
    """Move duplicates from kept to dropped in `counts`, and return the facts of the corpus.

    Args:
        written: what `write_corpus_file` returned, for every file.
    Raises:
        LostRecordsError: the files do not hold what was kept.
    """
    files = [entry["documents"] for entry in written]
    for entry in written:
        for language, count in entry["duplicate_languages"].items():
            counts.add_duplicates(language, count)
    num_rows = sum(file["num_rows"] for file in files)
    if num_rows != counts.num_kept or counts.dropped.get(DUPLICATE, 0) != num_duplicates:
        raise LostRecordsError(
            f"corpus: {counts.num_kept} documents kept and {num_duplicates} duplicates, but {num_rows} written and "
            f"{counts.dropped.get(DUPLICATE, 0)} left out"
        )
    counts.check("corpus")
    return {
        "documents": {
            "in": counts.num_in,
            "kept": counts.num_kept,
            "dropped": dict(sorted(counts.dropped.items())),
            "quarantined": counts.num_quarantined,
        },
        "quarantined": dict(sorted(counts.quarantined.items())),
        "masked": dict(sorted(counts.masked.items())),
        "bytes": sum(file["bytes"] for file in files),
        "languages": _sum_by_language(files),
        "sources": _sum_by_source(files),
    }


def _sum_by_language(files: Sequence[dict[str, Any]]) -> JsonValue:
    total: Counter[str] = Counter()
    for file in files:
        total.update(file["languages"])
    return dict(sorted(total.items()))


def _sum_by_source(files: Sequence[dict[str, Any]]) -> JsonValue:
    total: dict[tuple[str, str], list[int]] = {}
    for file in files:
        for source in file["sources"]:
            entry = total.setdefault((source["source"], source["licence"]), [0, 0])
            entry[0] += source["documents"]
            entry[1] += source["bytes"]
    return [
        {"source": source, "licence": licence, "documents": entry[0], "bytes": entry[1]}
        for (source, licence), entry in sorted(total.items())
    ]
