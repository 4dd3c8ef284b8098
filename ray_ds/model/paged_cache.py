"""A cache in blocks: sequences of any length share its memory, and equal beginnings can share blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_ds.config.model import ModelConfig
from ray_ds.model.row_exact import KEY_TILE


class PagedCache:
    """Holds a vector for every layer and token, as `SlotCache` does, in blocks of `block_size` tokens.

    Which block belongs to whom is not known here: whoever runs the model says where a sequence's tokens lie.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Reserve the memory, `cache_bytes_per_token` for each of num_blocks * block_size tokens.

        Args:
            block_size: a divisor of `KEY_TILE`, so that whole tiles can be read.
        """
        assert KEY_TILE % block_size == 0, f"blocks of {block_size} tokens do not fill tiles of {KEY_TILE}"
        shape = (num_blocks, block_size, config.cache_width)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.block_size = block_size
        self._read = torch.empty(0, dtype=dtype, device=device)

    def rows(
        self, blocks: Sequence[Sequence[int]], starts: Sequence[int], num_tokens: int, *, is_row_exact: bool
    ) -> "PagedRows":
        """Return the sequences that one forward pass extends, each by `num_tokens`.

        Args:
            blocks: of each sequence, in order, with room for the new tokens; the new ones' are no other sequence's.
            starts: tokens that each holds.
        """
        return PagedRows(self, blocks, starts, num_tokens, is_row_exact=is_row_exact)

    def gather(self, layer: int, table: Tensor) -> Tensor:
        """Return the vectors of a layer in blocks (B, N), (B, N * block_size, cache_width); good until the next call.

        All calls share one piece of memory: getting fresh pages for every layer of every step takes longer than the
        copy itself.
        """
        held = self.layers[layer]
        num_rows, num_blocks = table.shape
        count = table.numel() * self.block_size * held.shape[-1]
        if self._read.numel() < count:
            self._read = held.new_empty(count)
        read = self._read[:count].view(num_rows * num_blocks, self.block_size, -1)
        torch.index_select(held, 0, table.flatten(), out=read)
        return read.view(num_rows, num_blocks * self.block_size, -1)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Make blocks zero: even a masked NaN would spoil the sums of their next owner."""
        for layer in self.layers:
            layer[list(blocks)] = 0


class PagedRows:
    """Some sequences of a paged cache, as `CacheRows`."""

    def __init__(
        self,
        cache: PagedCache,
        blocks: Sequence[Sequence[int]],
        starts: Sequence[int],
        num_tokens: int,
        *,
        is_row_exact: bool,
    ) -> None:
        size = cache.block_size
        device = cache.layers[0].device
        span = max(starts) + num_tokens
        num_blocks = -(-span // KEY_TILE) * (KEY_TILE // size) if is_row_exact else -(-span // size)
        # Beyond a sequence's own blocks any will do: nothing there is looked at.
        table = [[*own[:num_blocks], *[0] * (num_blocks - len(own))] for own in blocks]
        self._table = torch.tensor(table, device=device)  # (B, S / block_size)
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
            num_tokens, device=device
        )  # (B, T)
        places = self._table.gather(1, self.positions // size) * size + self.positions % size  # (B, T)
        self._places = places.flatten()
        keys = torch.arange(num_blocks * size, device=device)
        self.mask = (keys <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)
        self.is_decode = num_tokens == 1
        self.is_row_exact = is_row_exact
        self._cache = cache

    def update(self, layer: int, vectors: Tensor) -> Tensor:
        """Store one layer's new vectors (B, T, cache_width); return all of the rows' so far, (B, S, cache_width)."""
        held = self._cache.layers[layer]  # (blocks, block_size, cache_width)
        held.view(-1, held.shape[-1])[self._places] = vectors.flatten(0, 1).to(held.dtype)
        return self._cache.gather(layer, self._table)  # (B, S, cache_width)

    def finish(self) -> None:
        """Do nothing: whoever gave the starts counts the tokens."""
