"""The tensors of a folder checked against its config, and written anew one by one."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_ds import storage
from ray_ds.config.model import ModelConfig
from ray_ds.errors import ArtifactError
from ray_ds.exchange.fp8 import SCALE_SUFFIX, check_scale, dequantize
from ray_ds.logs import log_event
from ray_ds.model.hugging_face.shapes import BIAS_SUFFIX, EMBEDDING, HEAD, copies_on_disk, shapes_on_disk
from ray_ds.model.tensor_folder import StoredTensor
from ray_ds.model.tensor_writer import write_shards

TABLES = ".rotary_emb.inv_freq"
"""Rotary frequencies, which old folders store; they follow from the config."""
FP8 = torch.float8_e4m3fn
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
COPY_WHOLE = "use a folder that was copied whole"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What becomes of a folder's tensors: the same names, checked, in their own type or another."""

    tensors: Mapping[str, StoredTensor]
    """By name on disk, in the order in which they are written."""
    scales: Mapping[str, StoredTensor]
    """Of the 8-bit weights, by the weight's name."""
    dtype: torch.dtype | None = None
    """Of what is written; None = each tensor keeps its own, and 8-bit weights become bf16."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that a tensor is written in."""
        own = self.tensors[name].dtype
        if name.endswith(BIAS_SUFFIX) and self.dtype is not None:
            return torch.float32
        return self.dtype or (torch.bfloat16 if own == FP8 else own)

    @property
    def main_dtype(self) -> torch.dtype:
        """Return the type that most of the numbers are written in."""
        counts: dict[torch.dtype, int] = {}
        for name, tensor in self.tensors.items():
            dtype = self.stored_dtype(name)
            counts[dtype] = counts.get(dtype, 0) + tensor.num_bytes // tensor.dtype.itemsize
        return max(counts, key=lambda dtype: counts[dtype])

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor as it is written."""
        return {
            name: tensor.num_bytes // tensor.dtype.itemsize * self.stored_dtype(name).itemsize
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is written.

        Raises:
            ArtifactError: a value is too large for the type.
        """
        tensor = self.tensors[name].read()
        if name in self.scales:
            tensor = dequantize(tensor, self.scales[name].read())
        converted = tensor.to(self.stored_dtype(name))
        if converted.dtype == torch.float16 and tensor.dtype != torch.float16 and not converted.isfinite().all():
            largest = f"values up to {tensor.float().abs().max():.4g}"
            raise ArtifactError(name, largest, "must be at most 65504 in float16", "export as bfloat16 or float32")
        return converted

    def write(self, target: str, *, max_shard_bytes: int) -> None:
        """Write all tensors into a folder, local or on an object store; about a file at a time is in memory."""
        with local_folder(target) as folder:
            for name in write_shards(folder, self.sizes(), self.read, max_shard_bytes=max_shard_bytes):
                if storage.is_remote(target):
                    move_file(folder / name, storage.join(target, name))
                log_event("written", file=name)


def plan_conversion(config: ModelConfig, stored: Mapping[str, StoredTensor], folder: str) -> Conversion:
    """Return how a folder's tensors become a checkpoint's, having checked that they are the config's.

    Raises:
        ArtifactError: a tensor is missing, surplus or has another shape; a copy differs from what it repeats.
    """
    wanted, copies = shapes_on_disk(config), copies_on_disk(config)
    scales = {name.removesuffix(SCALE_SUFFIX): tensor for name, tensor in stored.items() if name.endswith(SCALE_SUFFIX)}
    if config.tie_word_embeddings and HEAD in stored:
        _check_copy(folder, HEAD, EMBEDDING, stored)
    for name, tensor in stored.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        is_known = name in wanted or name.endswith(TABLES) or (name == HEAD and config.tie_word_embeddings)
        if not is_known and (weight == name or weight not in stored):
            raise _unfit(folder, name, str(tensor.shape), "must not be there: config.json has no place for it")
        if weight != name and stored[weight].dtype != FP8:
            raise _unfit(folder, name, "a scale", f"must belong to a weight of type F8_E4M3, and {weight} is none")
    tensors: dict[str, StoredTensor] = {}
    for name in [*(name for name in stored if name in wanted), *(name for name in wanted if name not in stored)]:
        source = stored.get(name) or stored.get(copies.get(name, ""))
        if source is None or source.shape != wanted[name]:
            found = "missing" if source is None else str(source.shape)
            raise _unfit(folder, name, found, f"must have the shape {wanted[name]} of config.json")
        if source.dtype == FP8:
            check_scale(source, scales.get(name))
        if name in copies and name in stored:
            _check_copy(folder, name, copies[name], stored)
        tensors[name] = source
    return Conversion(tensors=tensors, scales=scales)


def _check_copy(folder: str, name: str, original: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a tensor that should repeat another, bit for bit, and does not."""
    if original not in stored:
        return
    pair = [stored[each].read() for each in (name, original)]
    if pair[0].dtype != pair[1].dtype or not torch.equal(*(tensor.view(torch.uint8) for tensor in pair)):
        allowed = f"must equal {original}, which it repeats in this kind of model"
        raise _unfit(folder, name, "other values", allowed)


def _unfit(folder: str, name: str, value: str, allowed: str) -> ArtifactError:
    return ArtifactError(f"{folder}: {name}", value, allowed, COPY_WHOLE)


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """Give a local folder to write into: the one meant, or for an object store one that is deleted afterwards."""
    if storage.is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="ray_ds-exchange-") as temporary:
            yield Path(temporary)
        return
    folder = storage.local_path(uri)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def move_file(path: Path, uri: str) -> None:
    """Move a local file to an object store."""
    system, target = storage.filesystem(uri)
    with (
        storage.failures_named(uri),
        open(path, "rb") as file,
        system.open_output_stream(target, compression=None) as stream,
    ):
        while block := file.read(storage.HASH_BLOCK_BYTES):
            stream.write(block)
    path.unlink()
