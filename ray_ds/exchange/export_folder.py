"""From a checkpoint to a folder that transformers and vLLM open."""

import dataclasses
from typing import Any, Literal

import torch

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.exchange.conversion import DTYPE_NAMES, plan_conversion
from ray_ds.exchange.import_folder import TOKEN_FIELDS, dtype_fields, write_json
from ray_ds.exchange.sources import read_json
from ray_ds.exchange.tokenizer import exported_files
from ray_ds.model.hugging_face import check_expressible, from_hf_config, to_hf_config
from ray_ds.model.tensor_folder import list_tensors
from ray_ds.storage import join

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_checkpoint(artifact: Artifact, target: str, *, dtype: Dtype | None, max_shard_bytes: int) -> None:
    """Write a checkpoint for other programs; `config.json` comes last, so that a broken off export is none.

    Args:
        target: folder that is made; a local path or on an object store.
        dtype: of the weights; None = as the checkpoint has them.
        max_shard_bytes: size from which the next tensor starts a new file; about as much is in memory.
    Raises:
        ArtifactError: it is no checkpoint, is damaged, or does what no model of transformers does.
        ConfigError: the target is taken.
    """
    if not isinstance(artifact, Checkpoint):
        action = "name the Checkpoint; a QuantizedModel's `model/` is a folder for vLLM as it is"
        raise ArtifactError(artifact.uri, artifact.kind, "must be a Checkpoint", action)
    if storage.list_files(target):
        raise ConfigError("--output", target, "must be empty or absent", "choose another folder")
    artifact.verify_files()
    source = artifact.path("model")
    values: dict[str, Any] = dict(read_json(join(source, "config.json")))
    config = from_hf_config(values)
    check_expressible(config)
    conversion = dataclasses.replace(
        plan_conversion(config, list_tensors(source), source), dtype=DTYPES[dtype] if dtype else None
    )
    conversion.write(target, max_shard_bytes=max_shard_bytes)
    for name, data in exported_files(source).items():
        storage.write_bytes(join(target, name), data)
    write_json(join(target, "generation_config.json"), read_json(join(source, "generation_config.json")))
    tokens = {name: values.get(name) for name in TOKEN_FIELDS}
    written = dtype_fields(DTYPE_NAMES[conversion.main_dtype])
    write_json(join(target, "config.json"), {**to_hf_config(config), **tokens, **written})
