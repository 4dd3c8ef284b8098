"""Loading what is evaluated, and how it reads messages."""

from pathlib import Path

import torch

from ray_ds import storage
from ray_ds.artifacts import Artifact, QuantizedModel
from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import TEMPLATE_FILE, ChatTemplate
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.local_folder import MODEL_FOLDER, local_model_folder
from ray_ds.quantize import load_quantized
from ray_ds.tokenizer import BpeTokenizer

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


def open_chat(model: Artifact, tokenizer: BpeTokenizer) -> ChatEncoder | None:
    """Return how a model reads messages, if it has a chat template."""
    uri = model.path(MODEL_FOLDER, TEMPLATE_FILE)
    if not storage.exists(uri):
        return None
    return ChatEncoder(ChatTemplate(storage.read_bytes(uri).decode()), tokenizer)
