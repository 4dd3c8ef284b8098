"""Loading a quantized folder as a decoder whose linear layers multiply what is on disk."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_ds.config.model import ModelConfig
from ray_ds.config.quantize import Scheme
from ray_ds.errors import ArtifactError
from ray_ds.logs import log_event
from ray_ds.model.checkpoint_folder import CONFIG_FILE, read_config, read_tensors
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts
from ray_ds.model.hugging_face.shapes import copies_on_disk
from ray_ds.model.layers import MLP, give_memory
from ray_ds.quantize.kernels import Road, self_test
from ray_ds.quantize.layers import QuantizedExperts, QuantizedLinear, QuantizedMLP, QuantizedWeight
from ray_ds.quantize.layout import (
    PACKED_SUFFIX,
    PACKED_VALUES,
    SCALE_SUFFIX,
    SHAPE_SUFFIX,
    is_quantized,
    read_scheme,
    unpack,
    value_dtype,
)


def load_quantized(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    road: Road | None = None,
) -> Decoder:
    """Return the model in a folder that `quantize_folder` wrote, called like any decoder, for inference only.

    Args:
        dtype: of activations and of the weights that are not quantized; float32 or bfloat16.
        road: what multiplies; None = what `self_test` finds for this device and the model's scheme and shapes.
    Raises:
        ArtifactError: a file or tensor is missing, damaged, surplus or shaped otherwise than config.json says.
    """
    folder = Path(folder)
    config = read_config(folder)
    scheme = read_scheme(folder / CONFIG_FILE)
    tensors = _Tensors(folder, scheme, torch.device(device), copies_on_disk(config))
    with torch.device("meta"):
        decoder = Decoder(config)
    _put_quantized_layers(decoder, "", tensors, road or _choose_road(config, device, scheme))
    give_memory(decoder.to(dtype), device)
    _put_float_values(decoder, tensors)
    tensors.check_all_used()
    return decoder.eval().requires_grad_(False)


def integer_road(decoder: Decoder) -> Road:
    """Return how a decoder from `load_quantized` multiplies."""
    return next(module.road for module in decoder.modules() if isinstance(module, QuantizedLinear))


class _Tensors:
    """The tensors of a folder, each handed out once and checked."""

    def __init__(self, folder: Path, scheme: Scheme, device: torch.device, copies: Collection[str]) -> None:
        """Read all but the `copies`, which repeat others."""
        self._folder = folder
        self._scheme = scheme
        self._tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name not in copies}
        self._device = device

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of this shape and, where one is given, type."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise self._error(name, "missing", f"must be a tensor of shape {shape}")
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            allowed = f"must have shape {shape}" + (f" and type {dtype}" if dtype is not None else "")
            raise self._error(name, f"shape {tuple(tensor.shape)}, type {tensor.dtype}", allowed)
        return tensor.to(self._device)

    def take_weight(self, layer: str, out_features: int, in_features: int) -> QuantizedWeight:
        """Return a layer's weight."""
        weight, shape = f"{layer}.weight", (out_features, in_features)
        if self._scheme == "w8a16":
            width = -(-in_features // PACKED_VALUES)
            values = unpack(self.take(weight + PACKED_SUFFIX, (out_features, width), torch.int32), in_features)
            stored = self.take(weight + SHAPE_SUFFIX, (2,), torch.int64)
            if tuple(stored.tolist()) != shape:
                raise self._error(weight + SHAPE_SUFFIX, str(stored.tolist()), f"must be {list(shape)}")
        else:
            values = self.take(weight, shape, value_dtype(self._scheme))
        return values, self.take(weight + SCALE_SUFFIX, (out_features, 1), torch.float32)

    def take_gated(
        self, layer: str, hidden_size: int, inner: int
    ) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Return the weights of a gated MLP: gate, up and down."""
        gate = self.take_weight(f"{layer}.gate_proj", inner, hidden_size)
        up = self.take_weight(f"{layer}.up_proj", inner, hidden_size)
        return gate, up, self.take_weight(f"{layer}.down_proj", hidden_size, inner)

    def check_all_used(self) -> None:
        """Refuse tensors that the model has no place for."""
        for name, tensor in self._tensors.items():
            raise self._error(name, f"shape {tuple(tensor.shape)}", "must not be there")

    def _error(self, name: str, value: str, allowed: str) -> ArtifactError:
        return ArtifactError(f"{self._folder}: {name}", value, allowed, "restore the model or make it anew")


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return the shapes (N, K) in which a model's weights are multiplied: those of gate and up are one."""
    with torch.device("meta"):
        layers = Decoder(config).model.layers
    matrices = (parameter for parameter in layers.parameters() if parameter.dim() >= 2)
    stacked = (mlp.gate_proj for mlp in layers.modules() if isinstance(mlp, MLP))
    shapes = {(matrix.shape[-2], matrix.shape[-1]) for matrix in matrices}
    return sorted(shapes | {(2 * gate.out_features, gate.in_features) for gate in stacked})


def _choose_road(config: ModelConfig, device: str | torch.device, scheme: Scheme) -> Road:
    """Return the road that is right for the shapes of a model's weights, and log it."""
    found = self_test(device, matrix_shapes(config), scheme)
    log_event(
        "quantized_kernel",
        scheme=scheme,
        road=found.road,
        device=found.device,
        rejected=found.rejected,
        seconds=found.seconds,
    )
    return found.road


def _put_quantized_layers(module: nn.Module, prefix: str, tensors: _Tensors, road: Road) -> None:
    """Replace every layer below `module` whose weights are quantized."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, MLP):
            inner, hidden_size = child.gate_proj.weight.shape
            setattr(module, name, QuantizedMLP(*tensors.take_gated(path, hidden_size, inner), road))
        elif isinstance(child, Experts):
            count, hidden_size, inner = child.down_proj.shape
            experts = [tensors.take_gated(f"{path}.{i}", hidden_size, inner) for i in range(count)]
            setattr(module, name, QuantizedExperts(experts, road))
        elif isinstance(child, nn.Linear) and is_quantized(f"{path}.weight"):
            bias = None if child.bias is None else torch.empty_like(child.bias)  # gets its values as all floats do
            setattr(module, name, QuantizedLinear(tensors.take_weight(path, *child.weight.shape), road, bias))
        else:
            _put_quantized_layers(child, f"{path}.", tensors, road)


@torch.no_grad()
def _put_float_values(decoder: Decoder, tensors: _Tensors) -> None:
    """Give the parameters and buffers that are left their values."""
    state: dict[str, Tensor] = decoder.state_dict()
    for name, buffer in decoder.named_buffers():
        if name not in state:
            buffer.zero_()  # counters, which no file holds
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
        del state["lm_head.weight"]
    for name, value in state.items():
        value.copy_(tensors.take(name, tuple(value.shape)))
