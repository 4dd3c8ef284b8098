"""The layouts of compressed-tensors: which tensors are quantized, how they lie on disk, what config.json says of it.

Other engines read them too: vLLM loads them unchanged (dense INT8 models also on CPUs), Hugging Face with the package
compressed-tensors (dense models). That is why experts are separate 2-D tensors on disk.

| scheme | format | tensors of a weight `X.weight` (N, K), besides `X.weight_scale` fp32 (N, 1) |
|---|---|---|
| w8a8 | int-quantized | `X.weight` int8 (N, K) |
| w8a16 | pack-quantized | `X.weight_packed` int32 (N, K / 4 rounded up), `X.weight_shape` int64 (2,) |
| fp8 | float-quantized | `X.weight` E4M3 (N, K) |
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_ds.config.quantize import Scheme
from ray_ds.errors import ArtifactError
from ray_ds.quantize.float8 import E4M3, quantize_rows
from ray_ds.quantize.scheme import dequantize_weight, quantize_weight

SCALE_SUFFIX = "_scale"
PACKED_SUFFIX = "_packed"
SHAPE_SUFFIX = "_shape"
PACKED_VALUES = 4
"""Values in an int32: the first in its lowest byte, 128 added to each."""
FORMATS: Mapping[Scheme, str] = {"w8a8": "int-quantized", "w8a16": "pack-quantized", "fp8": "float-quantized"}

_QUANTIZED = re.compile(
    r"\.(self_attn\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)|mlp\.(.*\.)?(gate|up|down)_proj)\.weight"
)


def is_quantized(name: str) -> bool:
    """Tell whether a tensor of a checkpoint, by its name on disk, is quantized.

    Embeddings, output projection, router, norms and `kv_b_proj` are not: attention multiplies `kv_b_proj` into queries
    (and vLLM fails where it is INT8), and the others are small or sensitive.
    """
    found = _QUANTIZED.search(name)
    return found is not None and found.end() == len(name)


def value_dtype(scheme: Scheme) -> torch.dtype:
    """Return the type of a weight's values."""
    return E4M3 if scheme == "fp8" else torch.int8


def compress_weight(name: str, weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors on disk of a float weight (N, K)."""
    values, scale = quantize_rows(weight) if scheme == "fp8" else quantize_weight(weight)
    if scheme != "w8a16":
        return {name: values, name + SCALE_SUFFIX: scale}
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {name + PACKED_SUFFIX: pack(values), name + SCALE_SUFFIX: scale, name + SHAPE_SUFFIX: shape}


def compressed_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Return what the tensors on disk of a weight (N, K) take."""
    rows, columns = shape
    values = rows * columns if scheme != "w8a16" else rows * -(-columns // PACKED_VALUES) * 4 + 2 * 8
    return values + rows * 4


def dequantize_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the fp32 checkpoint that the tensors of a quantized model stand for, for programs that know none."""
    floats: dict[str, Tensor] = {}
    for stored, tensor in state.items():
        if stored.endswith((SCALE_SUFFIX, SHAPE_SUFFIX)):
            continue
        name = stored.removesuffix(PACKED_SUFFIX)
        scale = state.get(name + SCALE_SUFFIX)
        values = tensor if name == stored else unpack(tensor, int(state[name + SHAPE_SUFFIX][1]))
        floats[name] = values.float() if scale is None else dequantize_weight(values, scale)
    return floats


def pack(values: Tensor) -> Tensor:
    """Return int8 values (N, K) as int32 (N, K / 4), filled up with zero bytes."""
    unsigned = (values.short() + 128).to(torch.uint8)
    return F.pad(unsigned, (0, -values.shape[1] % PACKED_VALUES)).view(torch.int32)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return int8 values (N, columns) from int32 (N, K / 4)."""
    return (packed.view(torch.uint8)[:, :columns].short() - 128).to(torch.int8)


def quantization_config(scheme: Scheme = "w8a8", *, predicts_further: bool = False) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, as compressed-tensors defines it.

    Args:
        predicts_further: whether the model has modules of multi-token prediction, whose joint and head stay floats.
    """
    further = ["re:.*eh_proj$", "re:.*shared_head.head$"] if predicts_further else []
    numbers = {"num_bits": 8, "type": "float" if scheme == "fp8" else "int", "symmetric": True}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
    }
    if scheme != "w8a16":
        group["input_activations"] = {**numbers, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$", *further],
        "config_groups": {"group_0": group},
    }


def read_scheme(path: Path) -> Scheme:
    """Return the scheme of the model that a config.json describes.

    Raises:
        ArtifactError: it describes none of these layouts.
    """
    values = json.loads(path.read_text())
    found = values.get("quantization_config")
    predicts_further = bool(values.get("num_nextn_predict_layers"))
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    for scheme in schemes:
        if found == quantization_config(scheme, predicts_further=predicts_further):
            return scheme
    value = "no quantization_config" if found is None else json.dumps(found)
    allowed = "must hold a quantization_config that the quantize step writes (compressed-tensors)"
    raise ArtifactError(str(path), value, allowed, "make the model by the quantize step")
