"""The trained model in Hugging Face's layout, and its adapter alone in PEFT's."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from pyarrow import fs
from safetensors.torch import save
from torch import Tensor

from ray_ds import storage
from ray_ds.chat.template import TEMPLATE_FILE
from ray_ds.config.objective import Lora
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.tokenizer_files import copy_tokenizer
from ray_ds.train.lora import LORA_A, LORA_B, merge_adapters
from ray_ds.train.task import TrainTask

ADAPTER = "adapter"
MAX_FILE_BYTES = 5 << 30
"""Weights are spread over files of at most this size, Hugging Face's habit."""


def export_model(state: dict[str, Tensor], task: TrainTask, dtype: torch.dtype) -> None:
    """Write `model/` into the artefact's folder: config, weights in `dtype`, the shards' tokenizer and chat template.

    Adapters are added to the weights they stand beside, and written to `adapter/` too.
    """
    if task.settings.lora is not None:
        state, adapters = merge_adapters(state, task.settings.lora)
        _write_adapter(adapters, task.settings.lora, task)
    uri = storage.join(task.output, MODEL_FOLDER)
    storage.delete_folder(uri)
    with tempfile.TemporaryDirectory(prefix="ray_ds-export-") as temporary:
        folder = Path(temporary) if storage.is_remote(uri) else storage.local_path(uri)
        save_checkpoint_folder(
            state,
            task.config,
            folder,
            dtype=dtype,
            max_shard_bytes=MAX_FILE_BYTES,
            bos_token_id=task.bos_token_id,
            eos_token_id=task.eos_token_id,
        )
        copy_tokenizer(task.shards, str(folder))
        template = _find_template(task)
        if template is not None:
            (folder / TEMPLATE_FILE).write_bytes(template)
        if storage.is_remote(uri):
            upload_folder(folder, uri)


def _find_template(task: TrainTask) -> bytes | None:
    """Return the chat template of the shards, or of the model that training started from, if there is one."""
    found = [storage.join(task.shards, TEMPLATE_FILE)]
    if task.init_from is not None:
        found.append(storage.join(task.init_from, MODEL_FOLDER, TEMPLATE_FILE))
    return next((storage.read_bytes(uri) for uri in found if storage.exists(uri)), None)


def _write_adapter(adapters: Mapping[str, Tensor], lora: Lora, task: TrainTask) -> None:
    """Write the adapters' factors as PEFT names them (huggingface/peft 0.17, save_and_load.py)."""
    names = {name: f"base_model.model.{name}.weight" for name in adapters}
    modules = sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in adapters})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": task.init_from,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
    tensors = {names[name]: tensor.contiguous() for name, tensor in adapters.items()}
    storage.write_bytes(storage.join(task.output, ADAPTER, "adapter_model.safetensors"), save(tensors))
    text = json.dumps(config, indent=1) + "\n"
    storage.write_bytes(storage.join(task.output, ADAPTER, "adapter_config.json"), text.encode())


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder's files into a folder on an object store."""
    system, path = storage.filesystem(uri)
    fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)
