"""Actors with a model in memory that evaluation asks: what texts cost, how likely answers are, what it writes.

Who takes which batch makes no difference to a result.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util import ActorPool

from ray_ds.artifacts import Artifact, TokenShards
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.continuations import Key
from ray_ds.evaluate.models import load_model
from ray_ds.evaluate.perplexity import sum_loss
from ray_ds.evaluate.spans import Span
from ray_ds.evaluate.tasks import Batch, Result, run_batch
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What actors and tasks need to know."""

    model: Artifact
    shards: TokenShards
    settings: EvaluateSettings
    device: str
    spans: Sequence[Span]
    """The tokens of the validation split that are predicted."""


class Scorer:
    """An actor that has loaded the model."""

    def __init__(self, job: EvaluateJob) -> None:
        torch.set_num_threads(job.settings.threads_per_worker)
        self._cache = tempfile.TemporaryDirectory()
        self._device = job.device
        self._model = load_model(job.model, job.settings.precision, job.device, Path(self._cache.name))
        self._split = TokenSplit.open(job.shards.uri, "validation", Path(self._cache.name))
        self._tokenizer = load_tokenizer(job.model.path(MODEL_FOLDER, "tokenizer.json"))

    def sum_loss(self, spans: Sequence[Span]) -> tuple[int, float]:
        """Return the targets of a micro-batch and what they cost, in nats."""
        return sum(span.num_targets for span in spans), sum_loss(self._model, self._split, spans, self._device)

    def run_batch(self, batch: Batch) -> dict[Key, Result]:
        """Return what the model says to a batch of questions."""
        return run_batch(self._model, self._tokenizer, batch, self._device)


@contextmanager
def running_scorers(job: EvaluateJob) -> Iterator[list[Any]]:
    """Start the actors, as many as there are workers, and end them."""
    options = {"num_cpus": job.settings.cpus_per_worker, "num_gpus": float(job.device == "cuda")}
    actor = ray.remote(max_restarts=2, max_task_retries=2, **options)(Scorer)
    scorers = [actor.remote(job) for _ in range(job.settings.num_workers)]
    try:
        yield scorers
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def answer_batches(
    scorers: Sequence[Any], batches: Sequence[Batch], on_progress: Callable[[int], None] | None = None
) -> dict[Key, Result]:
    """Deal batches to the actors and return all that the model says.

    Args:
        on_progress: told after every batch how many are done.
    """
    results: dict[Key, Result] = {}
    answers = ActorPool(list(scorers)).map_unordered(lambda actor, batch: actor.run_batch.remote(batch), batches)
    for done, found in enumerate(answers, start=1):
        results |= found
        if on_progress is not None:
            on_progress(done)
    return results
