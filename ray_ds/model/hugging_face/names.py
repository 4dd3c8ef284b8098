"""Names of tensors on disk and in a decoder's state.

In memory a layer's routed experts are two stacked tensors; on disk every expert has three of its own.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.errors import ArtifactError
from ray_ds.model.hugging_face.shapes import EMBEDDING, HEAD, copies_on_disk

STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
SINGLE = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_hf_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a decoder's state under the names on disk; tensors are views of the given ones where they can be."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = STACKED.fullmatch(name)
        if match is None:
            out[name] = tensor
            continue
        for expert, weight in enumerate(tensor.unbind()):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "down_proj":
                out[f"{prefix}.down_proj.weight"] = weight
            else:
                out[f"{prefix}.gate_proj.weight"], out[f"{prefix}.up_proj.weight"] = weight.chunk(2)
    if config.tie_word_embeddings:
        del out[HEAD]
    for copy, original in copies_on_disk(config).items():
        out[copy] = out[original].clone()  # safetensors refuses one memory under two names
    return out


def from_hf_state_dict(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the decoder's state from tensors under their names on disk.

    Raises:
        ArtifactError: an expert of a layer is missing or has another shape than the first.
    """
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    copies = copies_on_disk(config)
    for name, tensor in tensors.items():
        if name in copies:
            continue
        match = SINGLE.fullmatch(name)
        if match is None:
            state[name] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for prefix, weights in experts.items():
        count = 1 + max(expert for expert, _ in weights)
        for kind in ("gate", "up", "down"):
            for expert in range(count):
                _check_expert(prefix, expert, kind, weights)
        pairs = [torch.cat((weights[expert, "gate"], weights[expert, "up"])) for expert in range(count)]
        state[f"{prefix}.gate_up_proj"] = torch.stack(pairs)  # (E, 2 * I, D)
        state[f"{prefix}.down_proj"] = torch.stack([weights[expert, "down"] for expert in range(count)])  # (E, D, I)
    if config.tie_word_embeddings and EMBEDDING in state:
        state[HEAD] = state[EMBEDDING]
    return state


def _check_expert(prefix: str, expert: int, kind: str, weights: Mapping[tuple[int, str], Tensor]) -> None:
    """Refuse a weight that is absent or shaped unlike the other experts'."""
    name = f"{prefix}.{expert}.{kind}_proj.weight"
    if (expert, kind) not in weights:
        raise ArtifactError(name, "missing", "must be in the checkpoint", "write the checkpoint again")
    found, first = tuple(weights[expert, kind].shape), next(iter(weights.values())).shape
    wanted = (first[1], first[0]) if (kind == "down") != (next(iter(weights))[1] == "down") else tuple(first)
    if found != wanted:
        raise ArtifactError(name, found, f"must have the shape {wanted}", "write the checkpoint again")
