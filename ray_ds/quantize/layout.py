"""The compressed-tensors layout `int-quantized`: which tensors become INT8 and what config.json says of it.

Other engines read it too: vLLM loads it unchanged (dense models also on CPUs), Hugging Face with the package
compressed-tensors (dense models). That is why experts are separate 2-D tensors on disk.
"""

import json
import re
from pathlib import Path
from typing import Any

from ray_ds.errors import ArtifactError

SCALE_SUFFIX = "_scale"
"""`X.weight` is int8 (N, K), `X.weight_scale` fp32 (N, 1)."""

_QUANTIZED = re.compile(
    r"\.(self_attn\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)|mlp\.(.*\.)?(gate|up|down)_proj)\.weight"
)


def is_quantized(name: str) -> bool:
    """Tell whether a tensor of a checkpoint, by its name on disk, becomes INT8.

    Embeddings, output projection, router, norms and `kv_b_proj` do not: attention multiplies `kv_b_proj` into queries
    (and vLLM fails where it is INT8), and the others are small or sensitive.
    """
    found = _QUANTIZED.search(name)
    return found is not None and found.end() == len(name)


def quantization_config(*, predicts_further: bool = False) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, as compressed-tensors defines it.

    Args:
        predicts_further: whether the model has modules of multi-token prediction, whose joint and head stay floats.
    """
    further = ["re:.*eh_proj$", "re:.*shared_head.head$"] if predicts_further else []
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$", *further],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
    }


def check_quantization_config(path: Path) -> None:
    """Make sure that a config.json describes an INT8 model of this layout.

    Raises:
        ArtifactError: it does not.
    """
    values = json.loads(path.read_text())
    found = values.get("quantization_config")
    if found != quantization_config(predicts_further=bool(values.get("num_nextn_predict_layers"))):
        value = "no quantization_config" if found is None else json.dumps(found)
        allowed = "must hold the quantization_config that the quantize step writes (compressed-tensors, int-quantized)"
        raise ArtifactError(str(path), value, allowed, "make the model by the quantize step")
