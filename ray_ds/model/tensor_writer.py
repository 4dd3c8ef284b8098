"""Writing tensors into safetensors files of a limited size, a file in memory at a time."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ray_ds.model.tensor_folder import INDEX_FILE, WEIGHTS_FILE


def write_shards(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], *, max_shard_bytes: int
) -> Iterator[str]:
    """Write tensors, and an index where they take more than one file; yield each file's name when it is written.

    Equal tensors give equal bytes. What is done with a file, such as moving it away, is done before the next is begun.

    Args:
        sizes: bytes of every tensor; files are filled in this order.
        read: gives the tensor that is written under a name.
        max_shard_bytes: size from which the next tensor starts a new file.
    Raises:
        OSError: a file cannot be written; the disk may be full.
    """
    shards = divide(sizes, max_shard_bytes)
    names = [WEIGHTS_FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _save({key: read(key).contiguous() for key in shard}, folder / name)
        # safetensors gives its files to their owner alone; whoever may read the folder may read its weights.
        (folder / name).chmod(folder.stat().st_mode & 0o666)
        yield name
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
        yield INDEX_FILE


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file; safetensors says what the system said in its text alone."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def divide(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the names, in order, that go to each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(index: int, count: int) -> str:
    """Return Hugging Face's name of the file at `index`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whose bytes follow from the values."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
