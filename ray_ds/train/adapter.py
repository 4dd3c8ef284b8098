"""An adapter's factors in the files of huggingface/peft (`save_and_load.py`; `lora/layer.py`: `ParamWrapper`)."""

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from ray_ds import storage
from ray_ds.config.objective import Lora
from ray_ds.train.lora import LORA_A, LORA_B, adapted_weights

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""In the order in which peft wraps the two parameters of one module: the first is the inner wrapper's."""


def write_adapter(adapters: Mapping[str, Tensor], lora: Lora, folder: str, *, base_model: str | None) -> None:
    """Write the factors and their settings, for `PeftModel.from_pretrained` on the base model in transformers 5.

    Args:
        adapters: the factors by name, as `merge_adapters` returns them.
        base_model: folder of the model they belong to.
    """
    weights = adapted_weights(adapters)
    experts = [weight for weight in weights if not weight.endswith(".weight")]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(weight.removesuffix(".weight") for weight in weights if weight not in experts),
        "target_parameters": sorted(experts),
    }
    tensors: dict[str, Tensor] = {}
    for weight, (down, up) in weights.items():
        tensors |= _expert_tensors(weight, down, up) if weight in experts else _linear_tensors(weight, down, up)
    storage.write_bytes(storage.join(folder, WEIGHTS), save(tensors))
    storage.write_bytes(storage.join(folder, CONFIG), (json.dumps(config, indent=1) + "\n").encode())


def _linear_tensors(weight: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return the factors of a linear layer, (r, in) and (out, r), under peft's names."""
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    return {f"{module}.{LORA_A}.weight": down.contiguous(), f"{module}.{LORA_B}.weight": up.contiguous()}


def _expert_tensors(weight: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return the factors of stacked experts, (E, r, in) and (E, out, r), under peft's names and in its shapes.

    They are (E * r, in), expert by expert, and (out, r * E), where the experts of one rank lie side by side. So it is
    from peft 0.19.1 on; earlier ones took a stacked weight's last dimension for its outputs.
    """
    experts, kind = weight.rsplit(".", 1)
    module = f"base_model.model.{experts}{'.base_layer' if kind == EXPERT_WEIGHTS[0] else ''}"
    return {
        f"{module}.{LORA_A}.weight": down.flatten(0, 1).contiguous(),
        f"{module}.{LORA_B}.weight": up.permute(1, 2, 0).flatten(1).contiguous(),
    }
