"""Loading an INT8 folder as a decoder whose linear layers multiply integers."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_ds.errors import ArtifactError
from ray_ds.logs import log_event
from ray_ds.model.checkpoint_folder import CONFIG_FILE, read_config, read_tensors
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts
from ray_ds.model.hugging_face.shapes import copies_on_disk
from ray_ds.model.layers import MLP, give_memory
from ray_ds.quantize.kernels import Road, self_test
from ray_ds.quantize.layers import Int8Experts, Int8Linear, Int8MLP, Int8Weight
from ray_ds.quantize.layout import SCALE_SUFFIX, check_quantization_config, is_quantized


def load_quantized(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    road: Road | None = None,
) -> Decoder:
    """Return the model in a folder that `quantize_folder` wrote, called like any decoder, for inference only.

    Args:
        dtype: of activations and of the weights that are not INT8; float32 or bfloat16.
        road: what multiplies integers; None = what `self_test` finds for this device and the model's shapes.
    Raises:
        ArtifactError: a file or tensor is missing, damaged, surplus or shaped otherwise than config.json says.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_quantization_config(folder / CONFIG_FILE)
    tensors = _Tensors(folder, torch.device(device), copies_on_disk(config))
    with torch.device("meta"):
        decoder = Decoder(config)
    _put_int8_layers(decoder, "", tensors, road or _choose_road(decoder, device))
    give_memory(decoder.to(dtype), device)
    _put_float_values(decoder, tensors)
    tensors.check_all_used()
    return decoder.eval().requires_grad_(False)


def integer_road(decoder: Decoder) -> Road:
    """Return how a decoder from `load_quantized` multiplies integers."""
    return next(module.road for module in decoder.modules() if isinstance(module, Int8Linear))


class _Tensors:
    """The tensors of a folder, each handed out once and checked."""

    def __init__(self, folder: Path, device: torch.device, copies: Collection[str]) -> None:
        """Read all but the `copies`, which repeat others."""
        self._folder = folder
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

    def take_int8(self, layer: str, out_features: int, in_features: int) -> Int8Weight:
        """Return a layer's weight."""
        weight = f"{layer}.weight"
        values = self.take(weight, (out_features, in_features), torch.int8)
        return values, self.take(weight + SCALE_SUFFIX, (out_features, 1), torch.float32)

    def take_gated(self, layer: str, hidden_size: int, inner: int) -> tuple[Int8Weight, Int8Weight, Int8Weight]:
        """Return the weights of a gated MLP: gate, up and down."""
        gate = self.take_int8(f"{layer}.gate_proj", inner, hidden_size)
        up = self.take_int8(f"{layer}.up_proj", inner, hidden_size)
        return gate, up, self.take_int8(f"{layer}.down_proj", hidden_size, inner)

    def check_all_used(self) -> None:
        """Refuse tensors that the model has no place for."""
        for name, tensor in self._tensors.items():
            raise self._error(name, f"shape {tuple(tensor.shape)}", "must not be there")

    def _error(self, name: str, value: str, allowed: str) -> ArtifactError:
        return ArtifactError(f"{self._folder}: {name}", value, allowed, "restore the model or make it anew")


def _choose_road(decoder: Decoder, device: str | torch.device) -> Road:
    """Return the road that is exact for the shapes of a decoder's weights, and log it."""
    layers = decoder.model.layers
    matrices = (parameter for parameter in layers.parameters() if parameter.dim() >= 2)
    stacked = (mlp.gate_proj for mlp in layers.modules() if isinstance(mlp, MLP))
    shapes = {(matrix.shape[-2], matrix.shape[-1]) for matrix in matrices}
    shapes |= {(2 * gate.out_features, gate.in_features) for gate in stacked}
    found = self_test(device, sorted(shapes))
    log_event("int8_kernel", road=found.road, device=found.device, rejected=found.rejected, seconds=found.seconds)
    return found.road


def _put_int8_layers(module: nn.Module, prefix: str, tensors: _Tensors, road: Road) -> None:
    """Replace every layer below `module` whose weights are INT8."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, MLP):
            inner, hidden_size = child.gate_proj.weight.shape
            setattr(module, name, Int8MLP(*tensors.take_gated(path, hidden_size, inner), road))
        elif isinstance(child, Experts):
            count, hidden_size, inner = child.down_proj.shape
            experts = [tensors.take_gated(f"{path}.{i}", hidden_size, inner) for i in range(count)]
            setattr(module, name, Int8Experts(experts, road))
        elif isinstance(child, nn.Linear) and is_quantized(f"{path}.weight"):
            bias = None if child.bias is None else torch.empty_like(child.bias)  # gets its values as all floats do
            setattr(module, name, Int8Linear(tensors.take_int8(path, *child.weight.shape), road, bias))
        else:
            _put_int8_layers(child, f"{path}.", tensors, road)


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
