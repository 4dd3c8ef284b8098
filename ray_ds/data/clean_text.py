"""Clean one work unit: read, mend, judge, mask, key; publish what is kept and account for every record."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from pydantic import JsonValue

from ray_ds.config.clean import CleanSettings
from ray_ds.data.counts import SAMPLE_CHARS, Counts, Sample, counts_to_json
from ray_ds.data.exact import duplicate_key
from ray_ds.data.filters import RULES, judge
from ray_ds.data.language import detect_language
from ray_ds.data.normalise import normalise_text
from ray_ds.data.pii import Masked, mask_pii
from ray_ds.data.readers import Record, read_unit
from ray_ds.data.units import Unit

Publish = Callable[[str, bytes], None]
"""Writes a file of the unit: (path below the artefact's folder, its bytes)."""

DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("language", pa.string()),
    ]
)
QUARANTINE = pa.schema(
    [
        ("uri", pa.string()),
        ("position", pa.int64()),
        ("damage", pa.string()),
        ("detail", pa.string()),
        ("excerpt", pa.large_binary()),
    ]
)
ROW_GROUP_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """What became of a readable record."""

    record: Record
    text: str
    language: str
    reason: str
    """Why it is dropped; empty for a kept one."""
    mask: int
    """All rules that it breaks, as in `filters.Verdict`."""
    key: bytes
    """Equal for exact duplicates."""
    masked: Masked | None


def clean_record(record: Record, settings: CleanSettings) -> Cleaned:
    """Return a good record's clean text and the verdict on it."""
    assert record.text is not None, "damaged records are set aside before"
    text = normalise_text(record.text)
    guess = detect_language(text)
    verdict = judge(text, guess, languages=settings.languages, min_score=settings.min_language_score)
    masked = mask_pii(text) if settings.mask_pii and not verdict.reason else None
    text = masked.text if masked is not None else text
    return Cleaned(
        record=record,
        text=text,
        language=guess.language,
        reason=verdict.reason,
        mask=verdict.mask,
        key=b"" if verdict.reason else duplicate_key(text),
        masked=masked,
    )


@dataclass(kw_only=True)
class _Parts:
    """Kept documents on their way into files of about `part_bytes` of text."""

    prefix: str
    part_bytes: int
    publish: Publish
    rows: list[dict[str, str]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    written: list[JsonValue] = field(default_factory=list)

    def add(self, cleaned: Cleaned) -> None:
        record = cleaned.record
        self.rows.append(
            {
                "doc_id": record.doc_id,
                "text": cleaned.text,
                "source": record.source,
                "licence": record.licence,
                "language": cleaned.language,
            }
        )
        self.keys.append(cleaned.key)
        self.num_bytes += len(cleaned.text.encode())
        if self.num_bytes >= self.part_bytes:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        path = f"{self.prefix}-{len(self.written):04d}"
        self.publish(f"{path}.parquet", to_parquet(pa.Table.from_pylist(self.rows, schema=DOCUMENTS)))
        self.publish(f"{path}.keys", b"".join(self.keys))
        self.written.append({"path": path, "num_rows": len(self.rows), "bytes": self.num_bytes})
        self.rows, self.keys, self.num_bytes = [], [], 0


def clean_unit(unit: Unit, settings: CleanSettings, publish: Publish, *, folder: str) -> dict[str, JsonValue]:
    """Clean a work unit and return its `counts` and `parts`.

    Publishes, below `folder`, parts of kept documents (`.parquet`) with their keys (`.keys`, 16 bytes a row), and in
    `quarantine/` what was damaged. The bytes depend on nothing but the unit's input and the settings.

    Raises:
        LostRecordsError: a record was lost or doubled.
    """
    counts = Counts()
    parts = _Parts(prefix=f"{folder}/{unit.name}-{unit.input_hash}", part_bytes=settings.unit_bytes, publish=publish)
    damaged: list[dict[str, Any]] = []
    for item in clean_records(_count_in(read_unit(unit), counts), settings):
        if isinstance(item, Record):
            counts.add_quarantined(item.damage)
            damaged.append({name: getattr(item, name) for name in QUARANTINE.names})
        elif item.reason:
            broken = [rule for bit, rule in enumerate(RULES) if item.mask >> bit & 1]
            counts.add_dropped(item.reason, broken, item.language, partial(_make_sample, item, settings))
        else:
            counts.add_kept(item.language, item.masked)
            parts.add(item)
    parts.flush()
    if damaged:
        table = pa.Table.from_pylist(damaged, schema=QUARANTINE)
        publish(f"quarantine/{unit.name}.parquet", to_parquet(table))
    counts.check(f"unit {unit.name}")
    return {"counts": counts_to_json(counts), "parts": parts.written}


def _make_sample(dropped: Cleaned, settings: CleanSettings) -> Sample:
    """Return the beginning of a dropped document; masked before it is cut, since half an address is not recognised."""
    text = mask_pii(dropped.text).text if settings.mask_pii else dropped.text
    return Sample(doc_id=dropped.record.doc_id, language=dropped.language, text=text[:SAMPLE_CHARS])


def clean_records(records: Iterable[Record], settings: CleanSettings) -> Iterator[Cleaned | Record]:
    """Yield each good record cleaned, and each damaged one as it is."""
    for record in records:
        yield record if record.damage else clean_record(record, settings)


def _count_in(records: Iterable[Record], counts: Counts) -> Iterator[Record]:
    """Count records as they are read, apart from what becomes of them."""
    for record in records:
        counts.num_in += 1
        yield record


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file whose bytes depend on the table alone."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data
