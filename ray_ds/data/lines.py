"""A raw file's bytes, decompressed, and its lines; of what is damaged, all that comes before is kept."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard

from ray_ds import storage
from ray_ds.data.units import InputFile

MAX_RECORD_BYTES = 32 << 20
"""A longer line, cell or txt file is set aside: a hundred Bibles' chapters in one record are no document."""
READ_BYTES = 1 << 18


class DamageError(Exception):
    """A record, or the rest of a stream, cannot be read."""

    def __init__(self, damage: str, detail: str = "") -> None:
        super().__init__(damage, detail)
        self.damage = damage
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Line:
    """A line, or what can be read of it."""

    position: int
    data: bytes
    """Without the line break, and cut after `MAX_RECORD_BYTES`."""
    length: int
    broken: DamageError | None = None
    """Set on the last line of a stream that could not be read to its end."""


def read_stream(file: InputFile, start: int = 0) -> Iterator[bytes]:
    """Yield a file's bytes from `start`, decompressed.

    Raises:
        DamageError: the compressed stream is cut or broken; what came before it has been yielded.
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
                raise DamageError("bad_gzip", str(error)) from error
            if data:
                yield data
            block = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if decoder.eof:
                decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
                is_inside = False
    if is_inside:
        raise DamageError("truncated_gzip", "the file ends inside a gzip member")


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
                raise DamageError("bad_zstd", str(error)) from error
            if data:
                yield data
            block = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = decompressor.decompressobj()
                is_inside = False
    if is_inside:
        raise DamageError("truncated_zstd", "the file ends inside a zstd frame")


def split_lines(blocks: Iterator[bytes], position: int) -> Iterator[Line]:
    """Yield lines with the offset of their first byte; of a gigantic one, only its beginning is held."""
    held = bytearray()
    length = 0
    try:
        for block in blocks:
            *ended, rest = block.split(b"\n")
            for part in ended:
                held += part[: MAX_RECORD_BYTES - len(held)]
                length += len(part)
                yield Line(position, bytes(held), length)
                position += length + 1
                held.clear()
                length = 0
            held += rest[: MAX_RECORD_BYTES - len(held)]
            length += len(rest)
    except DamageError as error:
        yield Line(position, bytes(held), length, broken=error)
        return
    if length:
        yield Line(position, bytes(held), length)
