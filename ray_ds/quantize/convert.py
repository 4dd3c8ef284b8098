"""From a checkpoint's folder to an INT8 folder, and back to floats."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import CONFIG_FILE, FP32_SUFFIX, read_config, read_tensors
from ray_ds.model.tensor_folder import INDEX_FILE, WEIGHTS_FILE
from ray_ds.quantize.layout import SCALE_SUFFIX, is_quantized, quantization_config
from ray_ds.quantize.scheme import dequantize_weight, quantize_weight
from ray_ds.tokenizer_files import copy_tokenizer

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBytes:
    """The size of a model's tensors."""

    int8: int
    """As written."""
    bf16: int
    """Of the same model with two bytes a value."""


def quantize_folder(source: Path, target: Path, *, max_shard_bytes: int) -> ModelBytes:
    """Write the INT8 model of a checkpoint's folder; the same checkpoint gives the same bytes.

    Args:
        source: Hugging Face's layout with float weights, and tokenizer.json; read tensor by tensor.
        max_shard_bytes: size from which the next tensor starts a new file.
    Raises:
        ArtifactError: the checkpoint is damaged or is INT8 already.
    """
    read_config(source)
    tensors = read_tensors(source)
    _check_floats(source, tensors)
    target.mkdir(parents=True, exist_ok=True)
    shards = _divide(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    written = 0
    for i, names in enumerate(shards):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        state = quantize_state({name: tensors[name] for name in names})
        save_file(state, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
        written += sum(tensor.nbytes for tensor in state.values())
    if len(shards) > 1:
        _write_json(target / INDEX_FILE, {"metadata": {"total_size": written}, "weight_map": weight_map})
    config = json.loads((source / CONFIG_FILE).read_text())
    int8 = quantization_config(predicts_further=bool(config.get("num_nextn_predict_layers")))
    config |= {name: "bfloat16" for name in ("dtype", "torch_dtype") if name in config}
    _write_json(target / CONFIG_FILE, {**config, "quantization_config": int8})
    shutil.copyfile(source / GENERATION_CONFIG_FILE, target / GENERATION_CONFIG_FILE)
    copy_tokenizer(str(source.absolute()), str(target.absolute()))
    return ModelBytes(int8=written, bf16=sum(2 * tensor.numel() for tensor in tensors.values()))


def quantize_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by their names on disk, as the INT8 layout has them, sorted by name."""
    quantized: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_quantized(name):
            quantized[name], quantized[name + SCALE_SUFFIX] = quantize_weight(tensor)
        else:
            quantized[name] = tensor.to(_float_dtype(name))
    return dict(sorted(quantized.items()))


def dequantize_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the fp32 checkpoint that the tensors of an INT8 model stand for, for programs that know no INT8."""
    return {
        name: dequantize_weight(tensor, state[name + SCALE_SUFFIX]) if name + SCALE_SUFFIX in state else tensor.float()
        for name, tensor in state.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def _float_dtype(name: str) -> torch.dtype:
    """Return the type on disk of a tensor that does not become INT8."""
    return torch.float32 if name.endswith(FP32_SUFFIX) else torch.bfloat16


def _check_floats(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no finite floats."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            field = f"{source}: {name}"
            raise ArtifactError(field, str(tensor.dtype), "must be of a float type", "quantize the checkpoint itself")
        if not math.isfinite(tensor.float().abs().max().item()):
            allowed = "must have finite values only"
            raise ArtifactError(f"{source}: {name}", "NaN or infinity", allowed, "go back to an earlier checkpoint")


def _divide(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Return the names, in order, that go to each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        count = tensors[name].numel()
        size = count + 4 * len(tensors[name]) if is_quantized(name) else count * _float_dtype(name).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
