"""The trained model in Hugging Face's layout."""

import tempfile
from pathlib import Path

import torch
from pyarrow import fs
from torch import Tensor

from ray_ds import storage
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.tokenizer_files import copy_tokenizer
from ray_ds.train.task import TrainTask

MODEL = "model"
MAX_FILE_BYTES = 5 << 30
"""Weights are spread over files of at most this size, Hugging Face's habit."""


def export_model(state: dict[str, Tensor], task: TrainTask, dtype: torch.dtype) -> None:
    """Write `model/` into the artefact's folder: config, weights in `dtype`, and the shards' tokenizer."""
    uri = storage.join(task.output, MODEL)
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
        if storage.is_remote(uri):
            upload_folder(folder, uri)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder's files into a folder on an object store."""
    system, path = storage.filesystem(uri)
    fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)
