"""A batch on its way through the model, one micro-batch after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ray_ds.model.documents import number_documents
from ray_ds.train.batches import Batches
from ray_ds.train.host import Host
from ray_ds.train.objective import MicroBatch
from ray_ds.train.task import TrainTask
from ray_ds.train.zero.engine import Engine


class BatchPass:
    """Adds up the gradient of this process's micro-batches of one batch, as far as it is told to."""

    def __init__(self, number: int, cursor: int, task: TrainTask, host: Host, engine: Engine, batches: Batches) -> None:
        """Begin, with nothing computed yet.

        Args:
            number: of the step, from 1.
            cursor: number of the batch.
        """
        self._number, self._cursor = number, cursor
        self._task, self._host, self._engine, self._batches = task, host, engine, batches
        self.terms = batches.terms(cursor)
        self._sums: Tensor | float = 0.0
        self._micro_batches = self._run()

    def advance(self) -> None:
        """Launch the next micro-batch."""
        next(self._micro_batches)

    def finish(self) -> Tensor:
        """Launch all that is left; return the micro-batches' summed loss and figures, (1 + F,), fp64."""
        for _ in self._micro_batches:
            pass
        self._host.beat(f"step {self._number} gradients")
        assert isinstance(self._sums, Tensor), "every process has a micro-batch, if only as padding"
        return self._sums

    def _run(self) -> Iterator[None]:
        for place, batch in enumerate(self._batches.of_batch(self._cursor)):
            self._host.beat(f"step {self._number} micro-batch {place + 1}")
            if batch.index is not None:
                seed_micro_batch(self._task.settings.seed, self._cursor, batch.index)
            sums = self._engine.forward_backward(masked(batch, self._task), terms=self.terms)
            self._sums = self._sums + sums.double()
            yield


def masked(batch: MicroBatch, task: TrainTask) -> MicroBatch:
    """Return a stream's rows with the numbers of their documents, where attention is to stay within these."""
    if not task.settings.document_mask:
        return batch
    return batch._replace(segments=number_documents(batch.tokens, task.bos_token_id))


def seed_micro_batch(seed: int, cursor: int, index: int) -> None:
    """Make the random numbers of a micro-batch depend on its place in the data alone, not on who computes it when.

    So no state of a generator has to be kept: it follows from the cursor.

    Args:
        seed: not negative, of any size: it counts modulo 2 ** 64, as torch takes it.
    """
    torch.manual_seed(((seed * 1_000_003 + cursor) * 65_537 + index) % 2**64)
