"""A model as a folder of safetensors that `transformers` and vLLM open too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.balance import reset_expert_load
from ray_ds.model.decoder import Decoder
from ray_ds.model.hugging_face import from_hf_config, from_hf_state_dict, to_hf_config, to_hf_state_dict
from ray_ds.model.hugging_face.shapes import BIAS_SUFFIX
from ray_ds.model.layers import give_memory
from ray_ds.model.tensor_folder import INDEX_FILE, WEIGHTS_FILE
from ray_ds.model.tensor_writer import write_json, write_shards

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FP32_SUFFIX = BIAS_SUFFIX


def save_checkpoint_folder(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> list[str]:
    """Write a decoder's state; equal arguments give equal bytes.

    Args:
        state: as `Decoder.state_dict()` gives it, on any device and in any type.
        folder: is made; must hold no weights yet.
        dtype: of the tensors on disk.
        max_shard_bytes: size from which the next tensor starts a new file.
    Returns:
        The names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_state_dict(state, config)
    sizes = {name: tensors[name].numel() * _stored_dtype(name, dtype).itemsize for name in sorted(tensors)}

    def stored(name: str) -> Tensor:
        return tensors[name].to("cpu", _stored_dtype(name, dtype))

    names = list(write_shards(folder, sizes, stored, max_shard_bytes=max_shard_bytes))
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    write_json(folder / CONFIG_FILE, {**to_hf_config(config, **tokens), "dtype": DTYPE_NAMES[dtype]})
    write_json(folder / GENERATION_CONFIG_FILE, {"_from_model_config": True, **tokens})
    return [CONFIG_FILE, GENERATION_CONFIG_FILE, *names]


def load_checkpoint_folder(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Return the decoder that a folder holds, in evaluation mode.

    Raises:
        ArtifactError: a file is missing or damaged; a tensor is missing, surplus or has the wrong shape.
    """
    config = read_config(folder)
    state = from_hf_state_dict(read_tensors(folder), config)
    with torch.device("meta"):
        decoder = Decoder(config)
    _check_tensors(folder, decoder, state)
    give_memory(decoder.to(dtype), device)
    decoder.tie_embeddings()
    decoder.load_state_dict(state)
    reset_expert_load(decoder)
    return decoder.eval()


def read_config(folder: Path) -> ModelConfig:
    """Return the model that a folder's `config.json` describes.

    Raises:
        ArtifactError: it is missing, damaged or describes a model of another kind.
    """
    try:
        return from_hf_config(_read_json(folder / CONFIG_FILE))
    except ConfigError as error:
        field = f"{folder / CONFIG_FILE}: {error.field}"
        raise ArtifactError(field, error.value, error.allowed, "use a checkpoint that this package wrote") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder under their names on disk, mapped from the files.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    names = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        names = sorted(set(_read_json(folder / INDEX_FILE)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError as error:
            raise ArtifactError(str(folder / name), "missing", "must be there", "copy or make it again") from error
        except SafetensorError as error:
            size = f"{(folder / name).stat().st_size} bytes"
            allowed = f"must be a whole safetensors file ({error})"
            raise ArtifactError(str(folder / name), size, allowed, "copy or make it again") from error
    return tensors


def _check_tensors(folder: Path, decoder: Decoder, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the decoder's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for name in [*wanted, *state]:
        found = tuple(state[name].shape) if name in state else "missing"
        allowed = f"must have the shape {wanted[name]} of config.json" if name in wanted else "must not be there"
        if name not in wanted or found != wanted[name]:
            raise ArtifactError(f"{folder}: {name}", str(found), allowed, "use a folder that was copied whole")


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a tensor has on disk."""
    return torch.float32 if name.endswith(FP32_SUFFIX) else dtype


def _read_json(path: Path) -> Any:
    """Return the contents of a JSON file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(str(path), "missing", "must be there", "copy or make it again") from error
    except ValueError as error:
        raise ArtifactError(str(path), str(error), "must be JSON", "copy or make it again") from error
