"""Weights in 8-bit floats with a scale a block of 128 x 128, as DeepSeek-V3 is published (arXiv 2412.19437, 3.3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_ds.errors import ArtifactError
from ray_ds.model.tensor_folder import StoredTensor

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128
FIELD = "config.json: quantization_config"


def check_quantization(config: Mapping[str, Any] | None) -> bool:
    """Tell whether a `quantization_config` is there and is this one.

    Raises:
        ArtifactError: it is another.
    """
    if not config:
        return False
    action = "use the folder of the model before it was quantized"
    for name, wanted in (("quant_method", "fp8"), ("weight_block_size", [BLOCK, BLOCK])):
        if config.get(name) != wanted:
            raise ArtifactError(f"{FIELD}.{name}", config.get(name, "missing"), f"must be {wanted!r}", action)
    for name, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if config.get(name, only) != only:
            raise ArtifactError(f"{FIELD}.{name}", config[name], f"must be {only!r}", action)
    return True


def check_scale(weight: StoredTensor, scale: StoredTensor | None) -> None:
    """Refuse an 8-bit weight without a scale for each of its blocks.

    Raises:
        ArtifactError: it has none, or of another shape.
    """
    name = weight.name + SCALE_SUFFIX
    wanted = tuple(-(-size // BLOCK) for size in weight.shape)
    if scale is None or scale.shape != wanted or len(wanted) != 2:
        found = "missing" if scale is None else str(scale.shape)
        allowed = f"must have the shape {wanted}, a scale a block of {weight.name} {weight.shape}"
        raise ArtifactError(name, found, allowed, "copy the folder again")


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Return what an 8-bit weight (N, K) with scales (N / 128, K / 128), rounded up, stands for, in bf16.

    The product is made in fp32 and rounded once, as DeepSeek's own conversion does.
    """
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    factors = scale.float()
    for row in range(len(scale)):
        rows = slice(row * BLOCK, (row + 1) * BLOCK)
        wide = factors[row].repeat_interleave(BLOCK)[: weight.shape[1]]  # (K,)
        out[rows] = (weight[rows].float() * wide).to(torch.bfloat16)
    return out
