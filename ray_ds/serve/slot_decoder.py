"""A decoder with its cache, as the engine wants it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import Decoder


class SlotDecoder:
    """Runs a decoder over the slots of one cache."""

    def __init__(self, decoder: Decoder, *, num_slots: int, max_len: int) -> None:
        """Reserve the cache in the embedding's type, on its device."""
        embedding = decoder.model.embed_tokens.weight
        self.num_slots = num_slots
        self.max_len = max_len
        self._device = embedding.device
        self._decoder = decoder.eval()
        self._cache = SlotCache(decoder.config, num_slots, max_len, dtype=embedding.dtype, device=embedding.device)

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Add tokens to the sequence in `slot`; return the logits (V,) that follow the last one."""
        rows = torch.tensor([list(tokens)], device=self._device)  # (1, T)
        last = torch.tensor([len(tokens) - 1], device=self._device)
        cache = self._cache.rows([slot], [len(tokens)])
        logits: Tensor = self._decoder(rows, cache=cache, logit_positions=last)  # (1, V)
        return logits[0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each sequence; return the logits (B, V) that follow."""
        rows = torch.tensor(list(tokens), device=self._device)[:, None]  # (B, 1)
        cache = self._cache.rows(slots, [1] * len(slots))
        logits: Tensor = self._decoder(rows, cache=cache)  # (B, 1, V)
        return logits[:, 0]

    def clear(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self._cache.clear(slot)
