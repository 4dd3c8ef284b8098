"""What decoding reads: one vector a token and layer, here in one slot a sequence; `paged_cache.py` has blocks."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig


class CacheRows(Protocol):
    """Some sequences of a cache, as the rows of one forward pass."""

    positions: Tensor
    """(B, T), of the new tokens."""
    mask: Tensor
    """(B, 1, T, S), True where a new token may look."""
    is_decode: bool
    """Whether each row adds one token, so that latent attention may read the vectors as they are."""
    is_row_exact: bool
    """Whether a row's bits may depend on nothing but the row: attention as in `row_exact.py`."""

    def update(self, layer: int, vectors: Tensor) -> Tensor:
        """Store one layer's new vectors (B, T, cache_width); return all of the rows' so far, (B, S, cache_width)."""

    def finish(self) -> None:
        """Count the new tokens as held, once every layer has stored them."""


class SlotCache:
    """Holds a vector for every layer and token of `num_slots` sequences.

    It is the normed latent and the turned key in latent attention, all heads' keys and then values in grouped-query
    attention.

    A slot is one sequence's place. Its owner prefills it, decodes it together with others and clears it; what other
    slots do never touches it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        drafts: bool = False,
    ) -> None:
        """Reserve the memory, `cache_bytes_per_token` for each of num_slots * max_len tokens.

        Args:
            drafts: also for the layers of multi-token prediction, which `Decoder.draft` runs.
        """
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if drafts else 0)
        self.vectors = torch.zeros(layers, num_slots, max_len, config.cache_width, dtype=dtype, device=device)
        self.max_len = max_len
        self.lengths = [0] * num_slots
        """Tokens held, by slot."""

    def rows(self, slots: Sequence[int], num_tokens: Sequence[int]) -> "SlotRows":
        """Return the slots that the rows of one forward pass extend.

        Args:
            slots: row i is the sequence in `slots[i]`; no slot twice.
            num_tokens: how many tokens row i adds. Rows that add fewer than the longest are padded at their end, with
                any token; their outputs there mean nothing.
        """
        return SlotRows(self, slots, num_tokens)

    def clear(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self.lengths[slot] = 0


class SlotRows:
    """Some slots of a cache, as `CacheRows`."""

    is_row_exact = False

    def __init__(self, cache: SlotCache, slots: Sequence[int], num_tokens: Sequence[int]) -> None:
        assert len(set(slots)) == len(slots) == len(num_tokens), "each row needs a slot of its own"
        starts = [cache.lengths[slot] for slot in slots]
        assert max(starts) + max(num_tokens) <= cache.max_len, "the cache is too short"
        device = cache.vectors.device
        self.cache = cache
        self.num_tokens = dict(zip(slots, num_tokens, strict=True))
        self.is_decode = max(num_tokens) == 1
        self.span = max(start + new for start, new in zip(starts, num_tokens, strict=True))
        """S: cached tokens that the longest row looks at."""
        self.slots = torch.tensor(slots, device=device)[:, None]  # (B, 1)
        steps = torch.arange(max(num_tokens), device=device)
        self.positions = torch.tensor(starts, device=device)[:, None] + steps  # (B, T)
        # Padding lies behind its row's own tokens, where no query of the row looks and later tokens overwrite it.
        keys = torch.arange(self.span, device=device)
        self.mask = (keys <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)

    def update(self, layer: int, vectors: Tensor) -> Tensor:
        """Store one layer's new vectors (B, T, cache_width); return all of the rows' so far, (B, S, cache_width)."""
        held = self.cache.vectors[layer]
        held[self.slots, self.positions] = vectors.to(held.dtype)
        return held[self.slots[:, 0], : self.span]  # (B, S, cache_width)

    def finish(self) -> None:
        """Count the new tokens as held, once every layer has stored them."""
        for slot, new in self.num_tokens.items():
            self.cache.lengths[slot] += new
