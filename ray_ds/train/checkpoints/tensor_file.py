"""Safetensors files written with their hash in one pass, and read by ranges without mapping them into memory.

The `safetensors` package hashes nothing while it writes, and maps what it reads: a file that is cut short meanwhile
would kill the process. Its format is a header's length in 8 bytes, the header in JSON, then the tensors' bytes.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.errors import ArtifactError

BLOCK_BYTES = 8 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The `safetensors` package refuses longer ones."""


def write_tensors(folder: str, path: str, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Write 1-D tensors into a safetensors file below a folder; flushed to disk where that is local."""
    digest, size = hashlib.sha256(), 0
    with _open_sink(storage.join(folder, path)) as write:
        for block in _blocks(tensors):
            digest.update(block)
            write(block)
            size += len(block)
    return FileInfo(path=path, bytes=size, sha256=digest.hexdigest())


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield the file's bytes."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that the tensors begin at a multiple of 8 bytes, as the format's own writer does.
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(struct.pack("<Q", len(encoded)) + encoded)
    for tensor in tensors.values():
        data = _bytes_of(tensor)
        for begin in range(0, len(data), BLOCK_BYTES):
            yield data[begin : begin + BLOCK_BYTES]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's memory."""
    data: memoryview = tensor.view(torch.uint8).numpy().data
    return data


def _open_new(target: Path) -> BinaryIO:
    """Open a local file to write, whose folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return open(target, "wb")


@contextlib.contextmanager
def _open_sink(uri: str) -> Iterator[Callable[[memoryview], object]]:
    """Open a file to write into; at the end it is on disk, or taken by the object store.

    Raises:
        StorageRefused, StorageUnavailable: as in `storage.failures_named`.
    """
    if storage.is_remote(uri):
        system, path = storage.filesystem(uri)
        with storage.failures_named(uri), system.open_output_stream(path, compression=None) as stream:
            yield stream.write
        return
    target = storage.local_path(uri)
    with storage.failures_named(uri), _open_new(target) as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())


class TensorFile:
    """A local safetensors file, open for reading."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ArtifactError: it is no safetensors file, or cut short.
        """
        self._path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        except FileNotFoundError:
            raise self._damaged("it is missing") from None
        self.size: int = os.fstat(self._file.fileno()).st_size
        self._begin, self._header = self._read_header()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Read elements of a tensor, from the `start`-th on, as many as the target has.

        Raises:
            ArtifactError: the file does not have them in the target's type.
        """
        try:
            entry = self._header[name]
            dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"it has no tensor {name}") from error
        if dtype != target.dtype:
            raise self._damaged(f"{name} is of type {dtype} instead of {target.dtype}")
        first = begin + start * dtype.itemsize
        if first + target.nbytes > end:
            value = f"{name} has {(end - begin) // dtype.itemsize} elements, not {start + target.numel()}"
            raise self._damaged(value)
        self._read_at(self._begin + first, _bytes_of(target), name)

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        length = bytearray(8)
        self._read_at(0, memoryview(length), "the header")
        size = struct.unpack("<Q", length)[0]
        if size > min(MAX_HEADER_BYTES, self.size):
            raise self._damaged("its header is cut short")
        header = bytearray(size)
        self._read_at(8, memoryview(header), "the header")
        try:
            found = json.loads(header)
        except ValueError as error:
            raise self._damaged(f"its header is no JSON ({error})") from None
        if not isinstance(found, dict):
            raise self._damaged("its header is no JSON object")
        return 8 + size, found

    def _read_at(self, offset: int, target: memoryview, what: str) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if not count:
                raise self._damaged(f"{what}: the file ends at byte {offset + done} instead of {offset + len(target)}")
            done += count

    def _damaged(self, value: str) -> ArtifactError:
        allowed = "must be a whole safetensors file, as it was written"
        return ArtifactError(str(self._path), value, allowed, "restore it, or delete its checkpoint's folder")
