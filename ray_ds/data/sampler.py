"""Which rows a training step sees: a pure function of the seed and the step, so that resuming needs no state."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """Deals every row once an epoch, in an order that keeps a step's reads within a few shards.

    An epoch's order: the shards are permuted and cut into windows of `window_shards`; the rows of each window are
    permuted. So a node needs the shards of one window at a time (of two where a step crosses over). Epochs follow each
    other without a gap: a step may take the last rows of one and the first of the next. The order does not depend on
    the number of processes, which divide a step's rows among themselves.

    Args:
        shard_rows: rows of each shard (`TokenSplit.shard_rows`); global row indices count through the shards in order.
        seed: not negative.
        window_shards: shards whose rows are mixed with each other.
        batch_rows: rows of a step, over all processes and accumulation steps.
    """

    def __init__(self, shard_rows: Sequence[int], *, seed: int, window_shards: int, batch_rows: int) -> None:
        assert sum(shard_rows) > 0, "there are no rows"
        assert window_shards > 0 and batch_rows > 0 and seed >= 0
        self._shard_rows = np.asarray(shard_rows, np.int64)
        self._shard_starts = np.cumsum(self._shard_rows) - self._shard_rows
        self._seed = seed
        self._window_shards = window_shards
        self.batch_rows = batch_rows
        self.num_rows = int(self._shard_rows.sum())
        self._epoch: tuple[int, list[NDArray[np.int64]], NDArray[np.int64]] | None = None
        self._window: tuple[int, int, NDArray[np.int64]] | None = None

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return the global row indices of a step, (batch_rows,); steps count from 0."""
        assert step >= 0
        position, left = step * self.batch_rows, self.batch_rows
        parts: list[NDArray[np.int64]] = []
        while left:
            epoch, offset = divmod(position, self.num_rows)
            part = self._from_window(epoch, offset)[:left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return np.concatenate(parts)

    def shards(self, start: int, stop: int) -> list[int]:
        """Return the shards that must be at hand for a part of the stream of rows: all those of its windows.

        Args:
            start: counts rows from the first one of step 0, through all epochs; so does `stop`.
        """
        found: dict[int, None] = {}
        while start < stop:
            window, end = self._window_at(start)
            found |= dict.fromkeys(window)
            start = end
        return list(found)

    def shards_by_next_use(self, start: int) -> list[int]:
        """Return all shards, those first that are needed first from row `start` of the stream on."""
        found: dict[int, None] = {}
        while len(found) < np.count_nonzero(self._shard_rows):
            window, start = self._window_at(start)
            found |= dict.fromkeys(window)
        return list(found)

    def _window_at(self, position: int) -> tuple[list[int], int]:
        """Return the shards of the window that a row of the stream is in, and where in the stream it ends."""
        epoch, offset = divmod(position, self.num_rows)
        windows, ends = self._epoch_windows(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        shards = [int(shard) for shard in windows[window] if self._shard_rows[shard]]
        return shards, epoch * self.num_rows + int(ends[window])

    def _from_window(self, epoch: int, offset: int) -> NDArray[np.int64]:
        """Return what follows `offset` (in rows of the epoch) within its window; at least one row."""
        windows, ends = self._epoch_windows(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        known = self._window  # threads share the sampler: each takes what it finds whole, or makes it
        if known is None or known[:2] != (epoch, window):
            shards = windows[window]
            rows = np.concatenate([np.arange(self._shard_rows[i]) + self._shard_starts[i] for i in shards])
            known = (epoch, window, rows[_permutation(len(rows), self._seed, epoch, 1 + window)])
            self._window = known
        start = int(ends[window - 1]) if window else 0
        return known[2][offset - start :]

    def _epoch_windows(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Return an epoch's windows, as shard indices, and the running sum of their rows."""
        known = self._epoch
        if known is None or known[0] != epoch:
            order = _permutation(len(self._shard_rows), self._seed, epoch, 0)
            windows = [order[i : i + self._window_shards] for i in range(0, len(order), self._window_shards)]
            ends = np.cumsum([self._shard_rows[window].sum() for window in windows])
            known = (epoch, windows, ends)
            self._epoch = known
        return known[1], known[2]


def _permutation(size: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of `range(size)` that is the same with every version of numpy.

    NumPy keeps the raw stream of a bit generator fixed, but not what `Generator.permutation` makes of it (NEP 19).
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")
