"""From a Hugging Face folder to the `model/` of a checkpoint."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.config.model import ModelConfig
from ray_ds.config.model_size import num_parameters
from ray_ds.errors import ArtifactError
from ray_ds.exchange.conversion import DTYPE_NAMES, plan_conversion
from ray_ds.exchange.fp8 import check_quantization
from ray_ds.exchange.sources import read_json
from ray_ds.exchange.tokenizer import ImportedTokenizer, read_tokenizer
from ray_ds.logs import log_event
from ray_ds.model.hugging_face import from_hf_config, to_hf_config
from ray_ds.model.hugging_face.shapes import prediction_layers
from ray_ds.model.tensor_folder import StoredTensor, list_tensors
from ray_ds.storage import join

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def import_folder(source: str, target: str, *, max_shard_bytes: int) -> dict[str, JsonValue]:
    """Write the folder of a model as a checkpoint's; return the artefact's facts.

    Everything is checked before anything is written. Tensors keep their bits and their type, but 8-bit floats become
    bf16.

    Args:
        source: config.json, safetensors and tokenizer.json; a local path or on an object store.
        max_shard_bytes: size from which the next tensor starts a new file; about as much is in memory.
    Raises:
        ArtifactError: a file is missing or damaged; the model does what this decoder does not; tensors are not its own.
        InputError: a JSON file is damaged.
    """
    values: dict[str, Any] = dict(read_json(join(source, "config.json")))
    generation = dict(read_json(join(source, "generation_config.json")))
    is_fp8 = check_quantization(values.get("quantization_config"))
    stored = list_tensors(source)
    config = without_absent_prediction(from_hf_config(values), stored)
    tokenizer = read_tokenizer(source, values, generation)
    check_vocabulary(tokenizer, config, source)
    conversion = plan_conversion(config, stored, source)
    conversion.write(target, max_shard_bytes=max_shard_bytes)
    tokens = token_ids(values, tokenizer)
    dtype = DTYPE_NAMES[conversion.main_dtype]
    for name, data in tokenizer.files.items():
        storage.write_bytes(join(target, name), data)
    write_json(join(target, "generation_config.json"), generation or {"_from_model_config": True, **tokens})
    write_json(join(target, "config.json"), {**to_hf_config(config), **tokens, **dtype_fields(dtype)})
    return {
        "family": str(values["model_type"]),
        "parameters": num_parameters(config),
        "dtype": dtype,
        "was_fp8": is_fp8,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest,
    }


def without_absent_prediction(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    """Return the config without modules of multi-token prediction of which the folder has nothing.

    transformers leaves them out when it saves a model, and their number in the config.
    """
    names = tuple(f"model.layers.{layer}." for layer in prediction_layers(config))
    if not names or any(name.startswith(names) for name in stored):
        return config
    log_event("prediction_modules_absent", asked=config.num_nextn_predict_layers)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def token_ids(values: Mapping[str, Any], tokenizer: ImportedTokenizer) -> dict[str, Any]:
    """Return the special tokens of a `config.json`: as they are, or the tokenizer's where it does not say."""
    ends = list(tokenizer.special_ids.eos_ids)
    own = {"bos_token_id": tokenizer.special_ids.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    given = {name: values.get(name) for name in TOKEN_FIELDS if values.get(name) is not None}
    return {"pad_token_id": None, **own, **given}


def dtype_fields(dtype: str) -> dict[str, str]:
    """Return the type of the weights under the name that transformers 5 reads, and the one that earlier ones read."""
    return {"dtype": dtype, "torch_dtype": dtype}


def check_vocabulary(tokenizer: ImportedTokenizer, config: ModelConfig, source: str) -> None:
    """Refuse a tokenizer with ids that the model does not know."""
    if tokenizer.vocab_size > config.vocab_size:
        allowed = f"must have at most vocab_size ({config.vocab_size}) tokens"
        raise ArtifactError(
            join(source, "tokenizer.json"), f"{tokenizer.vocab_size} tokens", allowed, "use the model's own tokenizer"
        )


def write_json(uri: str, values: Mapping[str, Any]) -> None:
    """Write a JSON file whose bytes follow from the values."""
    storage.write_bytes(uri, json.dumps(values, indent=2, sort_keys=True).encode() + b"\n")
