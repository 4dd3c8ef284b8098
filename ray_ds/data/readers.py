"""Read raw records piece by piece; what is damaged becomes a record that says where and why, and reading goes on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ray_ds.data.lines import MAX_RECORD_BYTES, DamageError, Line, read_stream, split_lines
from ray_ds.data.units import InputFile, Piece, Unit, missing_column_error, open_parquet

EXCERPT_BYTES = 1 << 16
PARQUET_ROWS = 256
SNIFF_RECORDS = 64
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A document as it was found, or, with `damage`, what is left of one."""

    uri: str
    position: int
    """Byte offset in the (decompressed) file; the row in a parquet file."""
    doc_id: str
    """`<file>-<position>`, and `:<own id>` after it where the raw file gave one; unique in any case."""
    text: str | None
    source: str = ""
    licence: str = ""
    damage: str = ""
    """Why it cannot be read: one of a fixed list of words; empty for a good record."""
    detail: str = ""
    excerpt: bytes = b""
    """At most `EXCERPT_BYTES` of what was found, of damaged records."""


def read_unit(unit: Unit) -> Iterator[Record]:
    """Yield the records of a work unit in order."""
    for piece in unit.pieces:
        yield from read_piece(piece)


def read_piece(piece: Piece) -> Iterator[Record]:
    """Yield the records of a piece in order; blank lines are none."""
    if piece.file.format == "parquet":
        return _read_parquet(piece)
    if piece.file.format == "txt":
        return _read_txt(piece)
    return _read_jsonl(piece)


def check_columns(files: list[InputFile]) -> None:
    """Look at the first good records of each jsonl layout; a column that all of them lack is a mistake in the recipe.

    Raises:
        InputError: a column is missing everywhere.
    """
    seen: set[int] = set()
    for file in files:
        if file.format != "jsonl" or id(file.files) in seen:
            continue
        known = _sniff_keys(file)
        if known is not None:
            seen.add(id(file.files))
            for name in file.files.columns():
                if name not in known:
                    raise missing_column_error(file, name, sorted(known))


def _sniff_keys(file: InputFile) -> set[str] | None:
    """Return all keys of a file's first good records; None where it has none."""
    keys: set[str] | None = None
    for number, line in enumerate(split_lines(read_stream(file), 0)):
        if number >= SNIFF_RECORDS:
            break
        try:
            keys = (keys or set()) | set(_parse_object(line))
        except DamageError:
            continue
    return keys


def _read_jsonl(piece: Piece) -> Iterator[Record]:
    """Yield the records whose first byte lies in [start, stop)."""
    lines = split_lines(read_stream(piece.file, max(piece.start - 1, 0)), max(piece.start - 1, 0))
    if piece.start > 0:
        next(lines, None)  # it began in the piece before, or is the empty end of its last line
    for line in lines:
        if line.position >= piece.stop and piece.file.compression is None:
            return
        if not line.data.strip() and line.broken is None:
            continue
        try:
            yield _make_record(piece, line.position, _parse_object(line))
        except DamageError as error:
            yield _damaged(piece, line.position, error, line.data)


def _read_txt(piece: Piece) -> Iterator[Record]:
    """Yield the file as one record."""
    data = bytearray()
    try:
        for block in read_stream(piece.file):
            data += block
            if len(data) > MAX_RECORD_BYTES:
                raise DamageError("too_long", f"more than {MAX_RECORD_BYTES} bytes")
        text = _decode(bytes(data).removeprefix(_BOM))
        if text.strip():
            yield _make_record(piece, 0, {piece.file.files.text_column: text})
    except DamageError as error:
        yield _damaged(piece, 0, error, bytes(data))


def _read_parquet(piece: Piece) -> Iterator[Record]:
    """Yield the rows of row groups [start, stop); a damaged group loses only its own rows."""
    try:
        reader = parquet.ParquetFile(open_parquet(piece.file.uri))
    except (pa.ArrowException, OSError) as error:
        yield _damaged(piece, 0, DamageError("bad_parquet", str(error)), b"")
        return
    columns = piece.file.files.columns()
    first_row = sum(reader.metadata.row_group(group).num_rows for group in range(piece.start))
    for group in range(piece.start, piece.stop):
        row = first_row
        try:
            for batch in reader.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                for values in zip(*(_column_values(batch.column(name)) for name in columns), strict=True):
                    yield _make_parquet_record(piece, row, dict(zip(columns, values, strict=True)))
                    row += 1
        except (pa.ArrowException, OSError) as error:
            yield _damaged(piece, row, DamageError("bad_parquet", f"row group {group}: {error}"), b"")
        first_row += reader.metadata.row_group(group).num_rows


def _column_values(column: pa.Array) -> list[Any]:
    """Return a column's values, strings as undecoded bytes: Parquet does not vouch for their UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _make_parquet_record(piece: Piece, row: int, values: dict[str, Any]) -> Record:
    text = values.get(piece.file.files.text_column)
    raw = text if isinstance(text, bytes) else b""
    try:
        if len(raw) > MAX_RECORD_BYTES:
            raise DamageError("too_long", f"{len(raw)} bytes")
        decoded = {name: _decode(value) if isinstance(value, bytes) else value for name, value in values.items()}
        return _make_record(piece, row, decoded)
    except DamageError as error:
        return _damaged(piece, row, error, raw)


def _parse_object(line: Line) -> dict[str, Any]:
    if line.broken is not None:
        raise line.broken
    if line.length > MAX_RECORD_BYTES:
        raise DamageError("too_long", f"{line.length} bytes")
    data = line.data.removeprefix(_BOM) if line.position == 0 else line.data
    text = _decode(data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamageError("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise DamageError("not_an_object", type(value).__name__)
    return value


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise DamageError("nul_byte", f"at byte {data.index(0)} of the record")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamageError("invalid_utf8", f"at byte {error.start} of the record") from error


def _make_record(piece: Piece, position: int, values: dict[str, Any]) -> Record:
    """Return the record, its columns checked."""
    files = piece.file.files
    text = _text_value(values, files.text_column)
    doc_id = f"{piece.doc_id_prefix}-{position}"
    if files.id_column is not None:
        own_id = values.get(files.id_column)
        is_number = isinstance(own_id, int) and not isinstance(own_id, bool)
        doc_id += f":{own_id if is_number else _text_value(values, files.id_column)}"
    return Record(
        uri=piece.file.uri,
        position=position,
        doc_id=doc_id,
        text=text,
        source=_text_value(values, files.source_column) if files.source_column is not None else files.source or "",
        licence=_text_value(values, files.licence_column) if files.licence_column is not None else files.licence or "",
    )


def _text_value(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise DamageError("missing_column", name)
    value = values[name]
    if value is None:
        raise DamageError("null_value", name)
    if not isinstance(value, str):
        raise DamageError("wrong_type", f"{name} is {type(value).__name__}")
    if "\0" in value:
        raise DamageError("nul_byte", f"at character {value.index(chr(0))} of {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DamageError("lone_surrogate", f"at character {error.start} of {name}") from error
    return value


def _damaged(piece: Piece, position: int, error: DamageError, data: bytes) -> Record:
    return Record(
        uri=piece.file.uri,
        position=position,
        doc_id=f"{piece.doc_id_prefix}-{position}",
        text=None,
        source=piece.file.files.source or "",
        licence=piece.file.files.licence or "",
        damage=error.damage,
        detail=error.detail,
        excerpt=data[:EXCERPT_BYTES],
    )
