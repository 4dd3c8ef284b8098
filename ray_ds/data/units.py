"""Which raw files there are, and how they are cut into work units."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pyarrow import parquet
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import SourceFile, make_digest
from ray_ds.config.clean import CleanSettings, InputFiles
from ray_ds.config.settings import digest_settings
from ray_ds.errors import ConfigError, InputError

Format = Literal["jsonl", "parquet", "txt"]
Compression = Literal["gzip", "zstd"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "txt"}
_TEXT_PER_COMPRESSED_BYTE = 3
"""How much text a byte of .gz or .zst is taken to hold when units are packed."""
_NUM_HASH_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A raw file and how to read it."""

    uri: str
    bytes: int
    format: Format
    compression: Compression | None
    files: InputFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a raw file: bytes `start` to `stop` of a plain jsonl file, row groups of a parquet file, else all."""

    file: InputFile
    sha256: str
    """Of the whole file."""
    copy: int
    """How many earlier files have the same bytes; keeps the doc_ids of copies apart."""
    start: int
    stop: int

    @property
    def doc_id_prefix(self) -> str:
        """What the ids of the file's documents begin with."""
        return self.sha256[:12] + (f".{self.copy}" if self.copy else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A work unit: what one task reads, cleans and commits."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Return the unit's number, padded so that names sort as numbers do."""
        return f"{self.index:05d}"

    @property
    def input_hash(self) -> str:
        """Return 16 hexadecimal digits that stand for the bytes the unit reads and for how it reads them."""
        parts: list[JsonValue] = [
            [
                [piece.doc_id_prefix, piece.sha256, piece.start, piece.stop],
                [piece.file.format, piece.file.compression, digest_settings(piece.file.files)],
            ]
            for piece in self.pieces
        ]
        return make_digest(parts)


def find_input_files(settings: CleanSettings) -> list[InputFile]:
    """Return the raw files in the order in which their documents are numbered.

    Raises:
        ConfigError: a glob is relative, or columns are named for txt files.
        InputError: a glob matches nothing or only empty files, a file is matched twice, a format is unknown.
    """
    found: list[InputFile] = []
    for index, files in enumerate(settings.inputs):
        field = f"inputs.{index}.glob"
        if not storage.is_absolute(files.glob):
            allowed = "must be absolute, because a job's working directory is a copy on each node"
            raise ConfigError(field, files.glob, allowed, "write an absolute path or URI, or pass --root")
        matched = [_describe_file(uri, files, field) for uri in storage.glob_files(files.glob)]
        if not matched:
            raise InputError(field, files.glob, "must match a file or more; it matches none", "check path and pattern")
        if all(file.bytes == 0 for file in matched):
            value = f"{len(matched)} of {len(matched)} files"
            raise InputError(f"{field} {files.glob}", value, "are empty; one must hold text", "check the files")
        if files.columns() != ["text"] and all(file.format == "txt" for file in matched):
            allowed = "must not name columns where all files are txt, which have none"
            raise ConfigError(
                field, files.glob, allowed, "remove text_column, id_column, source_column, licence_column"
            )
        found += matched
    for uri, count in Counter(file.uri for file in found).items():
        if count > 1:
            raise InputError("inputs", uri, f"must be matched by one glob; {count} match it", "narrow the globs")
    return found


def _describe_file(uri: str, files: InputFiles, field: str) -> InputFile:
    name = uri.rsplit("/", 1)[-1].lower()
    suffix = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
    stem = name.removesuffix(suffix)
    by_name = next((_FORMATS[ending] for ending in _FORMATS if stem.endswith(ending)), None)
    file_format = by_name if files.format == "auto" else files.format
    if file_format is None:
        allowed = "must end in .jsonl, .ndjson, .parquet or .txt (also with .gz or .zst) to be read by name"
        raise InputError(field, uri, allowed, "set `format`, or narrow the glob")
    system, path = storage.filesystem(uri)
    size: int = system.get_file_info(path).size or 0
    compression = _COMPRESSIONS[suffix] if suffix and file_format != "parquet" else None
    return InputFile(uri=uri, bytes=size, format=file_format, compression=compression, files=files)


def fingerprint_inputs(settings: CleanSettings) -> list[SourceFile]:
    """Return every raw file with its sha256, source and licence.

    Raises:
        ConfigError, InputError: as `find_input_files`.
    """
    found = find_input_files(settings)
    with ThreadPoolExecutor(_NUM_HASH_THREADS) as pool:
        digests = list(pool.map(storage.sha256_of_version, [file.uri for file in found]))
    return [
        SourceFile(
            uri=file.uri,
            bytes=file.bytes,
            sha256=digest,
            source=file.files.source or f"column {file.files.source_column}",
            licence=file.files.licence or f"column {file.files.licence_column}",
        )
        for file, digest in zip(found, digests, strict=True)
    ]


def plan_units(settings: CleanSettings, sources: Sequence[SourceFile]) -> tuple[Unit, ...]:
    """Cut the raw files into work units of about `unit_bytes`: small files share one, large ones are cut.

    Args:
        sources: what `fingerprint_inputs` returned.
    Raises:
        ConfigError, InputError: as `find_input_files`; or a parquet file lacks a column.
    """
    sha256 = {source.uri: source.sha256 for source in sources}
    seen: Counter[str] = Counter()
    units: list[Unit] = []
    waiting: list[Piece] = []
    waiting_bytes = 0
    for file in find_input_files(settings):
        if file.bytes == 0:
            continue
        digest = sha256[file.uri]
        for start, stop, size in _cut_file(file, settings.unit_bytes):
            if waiting and waiting_bytes + size > settings.unit_bytes:
                units.append(Unit(index=len(units), pieces=tuple(waiting)))
                waiting, waiting_bytes = [], 0
            waiting.append(Piece(file=file, sha256=digest, copy=seen[digest], start=start, stop=stop))
            waiting_bytes += size
        seen[digest] += 1
    units.append(Unit(index=len(units), pieces=tuple(waiting)))
    return tuple(units)


def _cut_file(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, bytes of text, estimated) of a file's pieces."""
    if file.format == "parquet":
        yield from _cut_parquet(file, unit_bytes)
    elif file.compression is not None:
        yield 0, file.bytes, file.bytes * _TEXT_PER_COMPRESSED_BYTE
    elif file.format == "txt":
        yield 0, file.bytes, file.bytes
    else:
        for start in range(0, file.bytes, unit_bytes):
            stop = min(start + unit_bytes, file.bytes)
            yield start, stop, stop - start


def _cut_parquet(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs of row groups; a file whose footer is damaged is one piece, which its reader sets aside."""
    try:
        reader = parquet.ParquetFile(open_parquet(file.uri))
    except (pa.ArrowException, OSError):
        yield 0, 0, file.bytes
        return
    _check_parquet_columns(file, reader.schema_arrow)
    start = size = 0
    for group in range(reader.num_row_groups):
        group_bytes = reader.metadata.row_group(group).total_byte_size
        if group > start and size + group_bytes > unit_bytes:
            yield start, group, size
            start, size = group, 0
        size += group_bytes
    if reader.num_row_groups:
        yield start, reader.num_row_groups, size


def open_parquet(uri: str) -> pa.NativeFile:
    """Open a file for random access."""
    system, path = storage.filesystem(uri)
    return system.open_input_file(path)


def _check_parquet_columns(file: InputFile, schema: pa.Schema) -> None:
    for name in file.files.columns():
        if name not in schema.names:
            raise missing_column_error(file, name, schema.names)
        kind = schema.field(name).type
        if name == file.files.text_column and not _is_text(kind):
            raise InputError(f"{file.uri} column {name}", str(kind), "must hold strings", "name another text_column")


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    )
    return any(test(value) for test in tests)


def missing_column_error(file: InputFile, name: str, known: Sequence[str]) -> InputError:
    """Return the complaint about a column that a whole file lacks."""
    columns = ", ".join(sorted(known)[:20]) or "none"
    return InputError(
        f"{file.uri} column {name}", "missing", f"must be one of the file's columns: {columns}", "name the right column"
    )
