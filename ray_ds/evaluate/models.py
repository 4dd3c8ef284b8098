"""Loading what is evaluated."""

from pathlib import Path

import torch

from ray_ds.artifacts import Artifact, QuantizedModel
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.local_folder import local_model_folder
from ray_ds.quantize import load_quantized

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
