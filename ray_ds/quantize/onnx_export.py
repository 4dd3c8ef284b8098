"""A dense model as an ONNX graph with dynamic INT8, for devices that run ONNX Runtime and no PyTorch.

Weights have a scale an output channel and seven bits, so that processors without VNNI add without saturation too.
Activations have one scale for a whole product, so unlike in `scheme.py` a row's result depends on its batch. The graph
has no cache: it takes whole sequences.
"""

import tempfile
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, read_config, read_tensors
from ray_ds.model.decoder import Decoder
from ray_ds.model.local_folder import local_model_folder
from ray_ds.model.rotary import rotary_tables
from ray_ds.tokenizer_files import copy_tokenizer

MODEL_FILE = "model.onnx"
OPSET = 17
MAX_BYTES = 2_000_000_000
"""Of the weights in fp32: one file, a protocol buffer, holds no more than 2 GiB."""


class WholeSequences(nn.Module):
    """A decoder whose positions and mask follow from its input alone, as a graph for any batch and length needs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T)."""
        positions = torch.ones_like(tokens).cumsum(dim=1) - 1  # (B, T)
        mask = positions[:, None, :, None] >= positions[:, None, None, :]  # (B, 1, T, T)
        hidden, _ = self.decoder.model(tokens, rotary_tables(positions, self.decoder.config), mask)
        logits: Tensor = self.decoder.lm_head(hidden)
        return logits


def export_onnx(artifact: Artifact, target: str) -> None:
    """Write `model.onnx`, from `input_ids` (B, T) to `logits` (B, T, V) in fp32, and the tokenizer.

    Args:
        target: local folder that is made.
    Raises:
        ArtifactError: it is no checkpoint, is damaged, has experts, or is too large for one file.
        ConfigError: the target is taken, or the packages are not installed.
    """
    if not isinstance(artifact, Checkpoint):
        raise ArtifactError(artifact.uri, artifact.kind, "must be a Checkpoint", "name the one that it was made from")
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise ConfigError("--to", "onnx", f"needs {' and '.join(missing)}", f"pip install {' '.join(missing)}")
    if storage.is_remote(target) or storage.list_files(target):
        raise ConfigError("--output", target, "must be a local folder, empty or absent", "choose another folder")
    artifact.verify_files()
    with tempfile.TemporaryDirectory(prefix="ray_ds-onnx-") as scratch:
        source, folder = local_model_folder(artifact, Path(scratch)), Path(target)
        _check_model(artifact.uri, source)
        decoder = load_checkpoint_folder(source, dtype=torch.float32, device="cpu")
        folder.mkdir(parents=True, exist_ok=True)
        write_float_graph(decoder, Path(scratch) / MODEL_FILE)
        quantize_graph(Path(scratch) / MODEL_FILE, folder / MODEL_FILE)
        copy_tokenizer(str(source.absolute()), str(folder.absolute()))


def write_float_graph(decoder: Decoder, path: Path) -> None:
    """Write a decoder's graph in fp32, for any number of rows and tokens."""
    axes = {0: "batch", 1: "tokens"}
    with warnings.catch_warnings():
        # The tracing exporter is called deprecated; its successor wants one more package and knows no older graphs.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            WholeSequences(decoder).eval(),
            (torch.zeros((2, 8), dtype=torch.int64),),
            str(path),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "logits": axes},
            opset_version=OPSET,
            dynamo=False,
        )


def quantize_graph(source: Path, target: Path) -> None:
    """Write a graph whose products with weights are of integers."""
    quantization = import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
    )


def _check_model(uri: str, folder: Path) -> None:
    """Refuse experts, which a traced graph would choose once and for all, and what no file can hold."""
    if experts := read_config(folder).n_routed_experts:
        action = "export a dense model, or serve this one by ray-ds"
        raise ArtifactError(f"{uri}: n_routed_experts", experts, "must be 0 for ONNX", action)
    size = sum(4 * tensor.numel() for tensor in read_tensors(folder).values())
    if size > MAX_BYTES:
        allowed = f"must have at most {MAX_BYTES} bytes of weights in fp32 for ONNX"
        raise ArtifactError(uri, size, allowed, "export a smaller model")
