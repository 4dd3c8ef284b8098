"""A decoder with its cache, as the engine wants it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_ds.config.serve import Exactness
from ray_ds.model.decoder import Decoder
from ray_ds.model.paged_cache import PagedCache
from ray_ds.model.row_tiles import use_row_tiles


class PagedDecoder:
    """Runs a decoder over the blocks of one cache."""

    def __init__(
        self, decoder: Decoder, *, num_blocks: int, block_size: int, max_len: int, exactness: Exactness = "none"
    ) -> None:
        """Reserve the cache in the embedding's type, on its device.

        Args:
            max_len: tokens of a sequence, prompt and answer.
            exactness: as in `ServeSettings`; unless `none`, the decoder's float layers work on tiles from now on.
        """
        embedding = decoder.model.embed_tokens.weight
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_len = max_len
        self._device = embedding.device
        self._decoder = decoder.eval()
        self._reads_exactly = exactness == "schedule"
        self._writes_exactly = exactness != "none"
        if self._writes_exactly:
            use_row_tiles(decoder)
        self._cache = PagedCache(
            decoder.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=embedding.dtype,
            device=embedding.device,
        )

    def read(self, blocks: Sequence[int], start: int, tokens: Sequence[int]) -> Tensor:
        """Add tokens to the sequence in `blocks`, which holds `start`; return their hidden states, (T, D)."""
        cache = self._cache.rows([blocks], [start], len(tokens), is_row_exact=self._reads_exactly)
        return self._decoder.hidden(torch.tensor([list(tokens)], device=self._device), cache=cache)[0]

    def write(self, blocks: Sequence[Sequence[int]], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each sequence; return their hidden states, (B, D)."""
        cache = self._cache.rows(blocks, starts, 1, is_row_exact=self._writes_exactly)
        return self._decoder.hidden(torch.tensor(tokens, device=self._device)[:, None], cache=cache)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V), in fp32, that follow hidden states (N, D)."""
        logits: Tensor = self._decoder.lm_head(hidden)
        return logits.float()

    def wipe(self, blocks: Sequence[int]) -> None:
        """Make blocks zero that held what is no number."""
        self._cache.wipe(blocks)
