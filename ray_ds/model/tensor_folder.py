"""Reading a folder of safetensors tensor by tensor, from a local disk or an object store.

The headers are checked before any tensor is read: a file that was cut short, or an index that names what is not there,
is found in a second. The format is a header's length in 8 bytes, the header in JSON, then the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ds import storage
from ray_ds.errors import ArtifactError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The types that weights and their scales come in."""
MAX_HEADER_BYTES = 100_000_000
"""The `safetensors` package refuses longer ones."""
COPY_AGAIN = "copy or make it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    uri: str
    """Of its file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            ArtifactError: the file has become shorter.
        """
        data = bytearray(self.num_bytes)
        system, path = storage.filesystem(self.uri)
        with storage.failures_named(self.uri), system.open_input_file(path) as file:
            file.seek(self.begin)
            count = file.readinto(data)
        if count != self.num_bytes:
            raise ArtifactError(f"{self.uri}: {self.name}", f"{count} bytes", f"must have {self.num_bytes}", COPY_AGAIN)
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(self.dtype).view(self.shape)


def weight_files(folder: str) -> list[str]:
    """Return the names of the safetensors files of a folder, in order.

    Raises:
        ArtifactError: there are none, or the index is damaged.
    """
    index = storage.join(folder, INDEX_FILE)
    if storage.exists(index):
        return sorted({str(name) for name in _read_index(index).values()})
    if storage.exists(storage.join(folder, WEIGHTS_FILE)):
        return [WEIGHTS_FILE]
    others = [entry.path for entry in storage.list_files(folder) if entry.path.endswith((".bin", ".safetensors"))]
    allowed = "must be there" + (f" beside {others[0]}" if others else "")
    advice = "copy the folder whole; save pickled weights (.bin) as safetensors with transformers' save_pretrained"
    raise ArtifactError(storage.join(folder, WEIGHTS_FILE), "missing, and no index", allowed, advice)


def list_tensors(folder: str) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by name, in the order of files and of their contents.

    Raises:
        ArtifactError: a file is missing or cut short, a tensor has a type that no weight has or is there twice, or the
            index names another file than the one that has it.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        for tensor in _read_header(storage.join(folder, name)):
            if tensor.name in tensors:
                value = f"in {tensors[tensor.name].uri} and {name}"
                raise ArtifactError(f"{folder}: {tensor.name}", value, "must be in one file", COPY_AGAIN)
            tensors[tensor.name] = tensor
    index = storage.join(folder, INDEX_FILE)
    if storage.exists(index):
        for name, file in _read_index(index).items():
            if name not in tensors or tensors[name].uri != storage.join(folder, str(file)):
                raise ArtifactError(f"{index}: {name}", str(file), "must be the file that has it", COPY_AGAIN)
    return tensors


def _read_index(uri: str) -> Mapping[str, Any]:
    """Return tensor -> file."""
    try:
        places = json.loads(storage.read_bytes(uri))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(uri, f"{type(error).__name__} {error}", "must be an index", COPY_AGAIN) from error
    if not isinstance(places, dict):
        raise ArtifactError(f"{uri}: weight_map", type(places).__name__, "must be a table", COPY_AGAIN)
    return places


def _read_header(uri: str) -> list[StoredTensor]:
    """Return the tensors of a file."""
    if not storage.exists(uri):
        raise ArtifactError(uri, "missing", "must be there", COPY_AGAIN)
    system, path = storage.filesystem(uri)
    with storage.failures_named(uri), system.open_input_file(path) as file:
        size: int = file.size()
        head = file.read_at(8, 0) if size >= 8 else b""
        length = struct.unpack("<Q", head)[0] if head else MAX_HEADER_BYTES
        encoded = file.read_at(length, 8) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    try:
        header: dict[str, Any] = json.loads(encoded)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        wanted = 8 + length + max(ends, default=0)
        if size != wanted:
            raise ValueError(f"its header asks for {wanted} bytes")
        return [_stored(uri, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        allowed = f"must be a whole safetensors file ({error})"
        raise ArtifactError(uri, f"{size} bytes", allowed, COPY_AGAIN) from error


def _stored(uri: str, name: str, entry: Mapping[str, Any], offset: int) -> StoredTensor:
    """Return one entry of a header."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        allowed = f"must be of type {', '.join(DTYPES)}"
        raise ArtifactError(f"{uri}: {name}", entry["dtype"], allowed, "use a folder with float weights")
    tensor = StoredTensor(
        name=name, uri=uri, dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), begin=offset + begin
    )
    if end - begin != tensor.num_bytes:
        raise ValueError(f"{name} has {end - begin} bytes instead of {tensor.num_bytes}")
    return tensor
