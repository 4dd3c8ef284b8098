"""Loading what is evaluated."""

import os
import shutil
from pathlib import Path

import torch

from ray_ds import storage
from ray_ds.artifacts import Artifact, QuantizedModel
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.quantize import load_quantized

MODEL_FOLDER = "model"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(artifact: Artifact, precision: str, device: str, cache: Path) -> Decoder:
    """Return the model of a Checkpoint or QuantizedModel, ready to be called with tokens and targets.

    Args:
        precision: type of activations, and of the weights that are not INT8.
        cache: local folder for a copy of a model on an object store.
    """
    folder, dtype = local_model_folder(artifact, cache), DTYPES[precision]
    if isinstance(artifact, QuantizedModel):
        return load_quantized(folder, device=device, dtype=dtype)
    return load_checkpoint_folder(folder, dtype=dtype, device=device)


def local_model_folder(artifact: Artifact, cache: Path) -> Path:
    """Return the artefact's `model/` on this node, copied into `cache` when the artefact is on an object store."""
    if not storage.is_remote(artifact.uri):
        return storage.local_path(artifact.path(MODEL_FOLDER))
    target = cache / artifact.digest
    if target.exists():
        return target
    partial = cache / f".{artifact.digest}.{os.getpid()}.partial"
    for info in artifact.manifest.files:
        if info.path.startswith(f"{MODEL_FOLDER}/"):
            path = partial / info.path.removeprefix(f"{MODEL_FOLDER}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for block in storage.read_blocks(artifact.path(info.path)):
                    file.write(block)
    try:
        os.replace(partial, target)
    except OSError:  # another process of this node was faster
        shutil.rmtree(partial)
        assert target.exists(), f"cannot move {partial} to {target}"
    return target
