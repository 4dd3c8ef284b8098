"""The state that training begins with where there is none to go on from: first weights, and nothing learnt yet."""

from collections.abc import Mapping

import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.model.decoder import Decoder
from ray_ds.train.state import Kind


class FirstState:
    """A `StateReader` of a model that was not trained yet.

    An engine trains in a type, and its masters start from the weights in that type: so do these.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype, facts: Mapping[str, JsonValue]) -> None:
        """Take a model with its first weights, on the CPU.

        Args:
            facts: an engine's, before its first step.
        """
        buffers = {name for name, _ in decoder.named_buffers()}
        state: dict[str, Tensor] = decoder.state_dict()
        self._masters = {name: tensor.to(dtype).float() for name, tensor in state.items() if name not in buffers}
        self._buffers = {name: tensor for name, tensor in state.items() if name in buffers}
        self.facts = facts

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether there is a tensor: there are no means of gradients."""
        return (kind == "master" and name in self._masters) or (kind == "buffer" and name in self._buffers)

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements of a flattened weight or buffer, 1-D."""
        tensor = self._masters[name] if kind == "master" else self._buffers[name]
        return tensor.view(-1)[start:stop]
