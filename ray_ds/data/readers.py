"""Read raw records piece by piece; what is damaged becomes a record that says where and why, and reading goes on."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import parquet

from ray_ds import storage
from ray_ds.data.units import InputFile, Piece, Unit, missing_column_error, open_parquet

MAX_RECORD_BYTES = 32 << 20
"""A longer line, cell or txt file is set aside: a hundred Bibles' chapters in one record are no document."""
EXCERPT_BYTES = 1 << 16
READ_BYTES = 1 << 18
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


class _DamageError(Exception):
    """A record, or the rest of a stream, cannot be read."""

    def __init__(self, damage: str, detail: str = "") -> None:
        super().__init__(damage, detail)
        self.damage = damage
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Line:
    position: int
    data: bytes
    """Without the line break, and cut after `MAX_RECORD_BYTES`."""
    length: int
    broken: _DamageError | None = None
    """Set on the last line of a stream that could not be read to its end."""


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
    for number, line in enumerate(_split_lines(_read_stream(file), 0)):
        if number >= SNIFF_RECORDS:
            break
        try:
            keys = (keys or set()) | set(_parse_object(line))
        except _DamageError:
            continue
    return keys


def _read_jsonl(piece: Piece) -> Iterator[Record]:
    """Yield the records whose first byte lies in [start, stop)."""
    lines = _split_lines(_read_stream(piece.file, max(piece.start - 1, 0)), max(piece.start - 1, 0))
    if piece.start > 0:
        next(lines, None)  # it began in the piece before, or is the empty end of its last line
    for line in lines:
        if line.position >= piece.stop and piece.file.compression is None:
            return
        if not line.data.strip() and line.broken is None:
            continue
        try:
            yield _make_record(piece, line.position, _parse_object(line))
        except _DamageError as error:
            yield _damaged(piece, line.position, error, line.data)


def _read_txt(piece: Piece) -> Iterator[Record]:
    """Yield the file as one record."""
    data = bytearray()
    try:
        for block in _read_stream(piece.file):
            data += block
            if len(data) > MAX_RECORD_BYTES:
                raise _DamageError("too_long", f"more than {MAX_RECORD_BYTES} bytes")
        text = _decode(bytes(data).removeprefix(_BOM))
        if text.strip():
            yield _make_record(piece, 0, {piece.file.files.text_column: text})
    except _DamageError as error:
        yield _damaged(piece, 0, error, bytes(data))


def _read_parquet(piece: Piece) -> Iterator[Record]:
    """Yield the rows of row groups [start, stop); a damaged group loses only its own rows."""
    try:
        reader = parquet.ParquetFile(open_parquet(piece.file.uri))
    except (pa.ArrowException, OSError) as error:
        yield _damaged(piece, 0, _DamageError("bad_parquet", str(error)), b"")
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
            yield _damaged(piece, row, _DamageError("bad_parquet", f"row group {group}: {error}"), b"")
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
            raise _DamageError("too_long", f"{len(raw)} bytes")
        decoded = {name: _decode(value) if isinstance(value, bytes) else value for name, value in values.items()}
        return _make_record(piece, row, decoded)
    except _DamageError as error:
        return _damaged(piece, row, error, raw)


def _read_stream(file: InputFile, start: int = 0) -> Iterator[bytes]:
    """Yield a file's bytes from `start`, decompressed.

    Raises:
        _DamageError: the compressed stream is cut or broken; what came before it has been yielded.
    """
    system, path = storage.filesystem(file.uri)
    with system.open_input_file(path) as opened:
        opened.seek(start)
        blocks = iter(lambda: opened.read(READ_BYTES), b"")
        if file.compression is None:
            yield from blocks
        elif file.compression == "gzip":
            yield from _inflate(blocks)
        else:
            yield from _decompress_zstd(blocks)


def _inflate(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip members; `zlib` rather than `gzip`, to keep all that can be read of a broken file."""
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
    is_inside = False
    for block in blocks:
        while block:
            if not is_inside and not block.strip(b"\0"):
                break  # gzip files may be padded with zeros
            is_inside = True
            try:
                data = decoder.decompress(block, READ_BYTES)
            except zlib.error as error:
                raise _DamageError("bad_gzip", str(error)) from error
            if data:
                yield data
            block = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if decoder.eof:
                decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
                is_inside = False
    if is_inside:
        raise _DamageError("truncated_gzip", "the file ends inside a gzip member")


def _decompress_zstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress zstd frames; frames end one by one, so that a cut one is noticed."""
    decompressor = zstandard.ZstdDecompressor()
    decoder = decompressor.decompressobj()
    is_inside = False
    for block in blocks:
        while block:
            is_inside = True
            try:
                data = decoder.decompress(block)
            except zstandard.ZstdError as error:
                raise _DamageError("bad_zstd", str(error)) from error
            if data:
                yield data
            block = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = decompressor.decompressobj()
                is_inside = False
    if is_inside:
        raise _DamageError("truncated_zstd", "the file ends inside a zstd frame")


def _split_lines(blocks: Iterator[bytes], position: int) -> Iterator[_Line]:
    """Yield lines with the offset of their first byte; of a gigantic one, only its beginning is held."""
    held = bytearray()
    length = 0
    try:
        for block in blocks:
            *ended, rest = block.split(b"\n")
            for part in ended:
                held += part[: MAX_RECORD_BYTES - len(held)]
                length += len(part)
                yield _Line(position, bytes(held), length)
                position += length + 1
                held.clear()
                length = 0
            held += rest[: MAX_RECORD_BYTES - len(held)]
            length += len(rest)
    except _DamageError as error:
        yield _Line(position, bytes(held), length, broken=error)
        return
    if length:
        yield _Line(position, bytes(held), length)


def _parse_object(line: _Line) -> dict[str, Any]:
    if line.broken is not None:
        raise line.broken
    if line.length > MAX_RECORD_BYTES:
        raise _DamageError("too_long", f"{line.length} bytes")
    data = line.data.removeprefix(_BOM) if line.position == 0 else line.data
    text = _decode(data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _DamageError("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise _DamageError("not_an_object", type(value).__name__)
    return value


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise _DamageError("nul_byte", f"at byte {data.index(0)} of the record")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _DamageError("invalid_utf8", f"at byte {error.start} of the record") from error


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
        raise _DamageError("missing_column", name)
    value = values[name]
    if value is None:
        raise _DamageError("null_value", name)
    if not isinstance(value, str):
        raise _DamageError("wrong_type", f"{name} is {type(value).__name__}")
    if "\0" in value:
        raise _DamageError("nul_byte", f"at character {value.index(chr(0))} of {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _DamageError("lone_surrogate", f"at character {error.start} of {name}") from error
    return value


def _damaged(piece: Piece, position: int, error: _DamageError, data: bytes) -> Record:
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
