"""The trained model in Hugging Face's layout, and its adapter alone in PEFT's."""

import tempfile
from pathlib import Path

import torch
from pyarrow import fs
from torch import Tensor

from ray_ds import storage
from ray_ds.chat.template import TEMPLATE_FILE
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.tokenizer_files import copy_tokenizer
from ray_ds.train.adapter import write_adapter
from ray_ds.train.lora import merge_adapters
from ray_ds.train.task import TrainTask

ADAPTER = "adapter"
MAX_FILE_BYTES = 5 << 30
"""Weights are spread over files of at most this size, Hugging Face's habit."""


def export_model(state: dict[str, Tensor], task: TrainTask, dtype: torch.dtype) -> None:
    """Write `model/` into the artefact's folder: config, weights in `dtype`, the shards' tokenizer and chat template.

    Adapters are added to the weights they stand beside, and written to `adapter/` too.

    Raises:
        StorageRefused, StorageUnavailable: it cannot be written; the disk may be full.
    """
    if task.settings.lora is not None:
        state, adapters = merge_adapters(state, task.settings.lora)
        adapter = storage.join(task.output, ADAPTER)
        write_adapter(adapters, task.settings.lora, adapter, base_model=task.init_from)
    uri = storage.join(task.output, MODEL_FOLDER)
    storage.delete_folder(uri)
    with tempfile.TemporaryDirectory(prefix="ray_ds-export-") as temporary:
        folder = Path(temporary) if storage.is_remote(uri) else storage.local_path(uri)
        with storage.failures_named(str(folder)):
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


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder's files into a folder on an object store."""
    system, path = storage.filesystem(uri)
    with storage.failures_named(uri):
        fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)
