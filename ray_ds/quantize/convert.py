"""From a checkpoint's folder to that of a quantized model, and back to floats."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_ds.config.quantize import Scheme
from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import CONFIG_FILE, FP32_SUFFIX, GENERATION_CONFIG_FILE, read_config, read_tensors
from ray_ds.model.tensor_folder import INDEX_FILE, WEIGHTS_FILE
from ray_ds.model.tensor_writer import divide, write_json, write_shards
from ray_ds.quantize.layout import (
    compress_weight,
    compressed_bytes,
    dequantize_state,
    is_quantized,
    quantization_config,
    read_scheme,
)
from ray_ds.quantize.smoothing import TensorFactors
from ray_ds.tokenizer_files import copy_tokenizer

UNCHANGED = TensorFactors()


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What `quantize_folder` wrote."""

    bytes: int
    """Of all tensors."""
    bf16_bytes: int
    """Of the same model with two bytes a value."""
    weight_errors: Mapping[str, float]
    """By name, how far a weight is from what it was: the norm of the difference over the norm."""


def quantize_folder(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int,
    scheme: Scheme = "w8a8",
    factors: Mapping[str, TensorFactors] | None = None,
) -> Written:
    """Write the quantized model of a checkpoint's folder; the same arguments give the same bytes.

    Args:
        source: Hugging Face's layout with float weights, and tokenizer.json; read tensor by tensor.
        max_shard_bytes: size from which the next tensor starts a new file.
        factors: what tensors are multiplied by first, from `find_factors`.
    Raises:
        ArtifactError: the checkpoint is damaged or is quantized already.
    """
    read_config(source)
    tensors = read_tensors(source)
    _check_floats(source, tensors)
    target.mkdir(parents=True, exist_ok=True)
    shards = divide({name: _stored_bytes(name, tensors[name], scheme) for name in sorted(tensors)}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    written = 0
    errors: dict[str, float] = {}
    for i, names in enumerate(shards):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        state: dict[str, Tensor] = {}
        for name in names:
            smoothed = (factors or {}).get(name, UNCHANGED).apply(tensors[name])
            if is_quantized(name):
                parts = compress_weight(name, smoothed, scheme)
                errors[name] = _relative_error(dequantize_state(parts)[name], smoothed)
                state |= parts
            else:
                state[name] = smoothed.to(_float_dtype(name))
        save_file(dict(sorted(state.items())), target / file, metadata={"format": "pt"})
        # safetensors gives its files to their owner alone; whoever may read the folder may read its weights.
        (target / file).chmod(target.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(state, file)
        written += sum(tensor.nbytes for tensor in state.values())
    if len(shards) > 1:
        write_json(target / INDEX_FILE, {"metadata": {"total_size": written}, "weight_map": weight_map})
    config = json.loads((source / CONFIG_FILE).read_text())
    described = quantization_config(scheme, predicts_further=bool(config.get("num_nextn_predict_layers")))
    _write_config(target, {**config, "quantization_config": described}, "bfloat16")
    _copy_rest(source, target)
    bf16_bytes = sum(2 * tensor.numel() for tensor in tensors.values())
    return Written(bytes=written, bf16_bytes=bf16_bytes, weight_errors=errors)


def dequantize_folder(source: Path, target: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write the float checkpoint that a quantized model's folder stands for, for programs that know none.

    Args:
        target: is made; must hold no weights yet.
        dtype: of the weights.
    Raises:
        ArtifactError: the source is damaged or is no quantized model.
    """
    read_scheme(source / CONFIG_FILE)
    floats = dequantize_state(read_tensors(source))
    target.mkdir(parents=True, exist_ok=True)
    dtypes = {name: torch.float32 if name.endswith(FP32_SUFFIX) else dtype for name in sorted(floats)}
    sizes = {name: floats[name].numel() * stored.itemsize for name, stored in dtypes.items()}
    list(write_shards(target, sizes, lambda name: floats[name].to(dtypes[name]), max_shard_bytes=max_shard_bytes))
    config = json.loads((source / CONFIG_FILE).read_text())
    del config["quantization_config"]
    _write_config(target, config, str(dtype).removeprefix("torch."))
    _copy_rest(source, target)


def _write_config(target: Path, config: Mapping[str, object], dtype: str) -> None:
    """Write a config.json whose type of weights is `dtype`, under the name that the given one has it."""
    write_json(target / CONFIG_FILE, {**config, **{name: dtype for name in ("dtype", "torch_dtype") if name in config}})


def _copy_rest(source: Path, target: Path) -> None:
    """Copy what does not change: the tokenizer and how to generate."""
    shutil.copyfile(source / GENERATION_CONFIG_FILE, target / GENERATION_CONFIG_FILE)
    copy_tokenizer(str(source.absolute()), str(target.absolute()))


def _float_dtype(name: str) -> torch.dtype:
    """Return the type on disk of a tensor that is not quantized."""
    return torch.float32 if name.endswith(FP32_SUFFIX) else torch.bfloat16


def _stored_bytes(name: str, tensor: Tensor, scheme: Scheme) -> int:
    """Return what a tensor takes on disk, its scales included."""
    if is_quantized(name):
        rows, columns = tensor.shape
        return compressed_bytes((rows, columns), scheme)
    return tensor.numel() * _float_dtype(name).itemsize


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm; 0 where both are zeros."""
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def _check_floats(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no finite floats."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            field = f"{source}: {name}"
            raise ArtifactError(field, str(tensor.dtype), "must be of a float type", "quantize the checkpoint itself")
        if not math.isfinite(tensor.float().abs().max().item()):
            allowed = "must have finite values only"
            raise ArtifactError(f"{source}: {name}", "NaN or infinity", allowed, "go back to an earlier checkpoint")
