"""Loading what is to be served."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.quantize import integer_road, load_quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A decoder ready to answer."""

    decoder: Decoder
    integer_path: str | None
    """The way its integer products are computed; None where it has none."""


def load_served_model(folder: Path, *, is_quantized: bool, device: torch.device, dtype: torch.dtype) -> ServedModel:
    """Return the model in a folder; loading an INT8 one tests the integer kernels and takes the fastest exact one.

    Args:
        dtype: of all weights that are not INT8.
    """
    if not is_quantized:
        return ServedModel(decoder=load_checkpoint_folder(folder, dtype=dtype, device=device), integer_path=None)
    decoder = load_quantized(folder, device, dtype)
    return ServedModel(decoder=decoder, integer_path=integer_road(decoder))
