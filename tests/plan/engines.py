"""The tensors of real DeepSpeed engines, counted over two steps, to hold the plan's states to."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ray_ds.config.train import TrainSettings
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.plan.case import Case, case_of
from ray_ds.train.objective import MicroBatch, NextTokenObjective
from tests.plan.live_memory import LiveMemory
from tests.train.runs import make_settings

VOCAB_SIZE, SEQ_LEN, MICRO_BATCH, MICRO_BATCHES = 2048, 16, 1, 2
BUCKET_NUMEL = 500_000
"""A tenth of the model, as DeepSpeed's 500 million are of a model with 5 billion parameters."""


@dataclass(frozen=True)
class Counted:
    """Bytes of live tensors in the second of two steps; activations are a few thousandths of them."""

    started: int
    kept: int
    after_first: int
    """Between the step's two micro-batches."""
    reducing: int
    updating: int


def engine_settings(world_size: int, **changes: Any) -> TrainSettings:
    """Return settings of steps with two micro-batches a worker."""
    parallel = changes.get("parallel", {})
    num_readers = world_size // (parallel.get("tensor", 1) * parallel.get("sequence", 1))
    base: dict[str, Any] = {
        "model": {"preset": "demo", "num_hidden_layers": 6},
        "seq_len": SEQ_LEN,
        "micro_batch": MICRO_BATCH,
        "batch_tokens": SEQ_LEN * MICRO_BATCH * MICRO_BATCHES * num_readers,
        "num_workers": world_size,
    }
    return make_settings(**{**base, **changes})


def case_for(settings: TrainSettings) -> Case:
    return case_of(settings, settings.model.resolve(VOCAB_SIZE, SEQ_LEN), settings.max_workers)


def count_engine(settings: TrainSettings) -> Counted:
    """Train two steps with torch's fused AdamW, as on a GPU: the plain one makes copies."""
    from ray_ds.train.zero import engine as engine_module
    from ray_ds.train.zero.config import deepspeed_config
    from ray_ds.train.zero.optimizer import make_optimizer

    def small_bucket(settings: TrainSettings, size: int, *, is_cuda: bool) -> dict[str, Any]:
        config = deepspeed_config(settings, size, is_cuda=is_cuda)
        config["zero_optimization"]["reduce_bucket_size"] = BUCKET_NUMEL
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "deepspeed_config", small_bucket)
        patch.setattr(
            engine_module,
            "make_optimizer",
            lambda named, settings, is_cuda: make_optimizer(named, settings, is_cuda=True),
        )
        memory = LiveMemory()
        with memory:
            return _run_two_steps(settings, engine_module, memory)


def _run_two_steps(settings: TrainSettings, engine_module: Any, memory: LiveMemory) -> Counted:
    decoder = Decoder(settings.model.resolve(VOCAB_SIZE, SEQ_LEN))
    init_weights(decoder, 0)
    memory.take_peak()
    engine = engine_module.Engine(
        NextTokenObjective(decoder), settings, device=torch.device("cpu"), world_size=settings.max_workers
    )
    started = memory.take_peak()
    tokens = torch.randint(VOCAB_SIZE, (MICRO_BATCH, SEQ_LEN))
    for _ in range(2):
        kept = memory.now
        engine.forward_backward(MicroBatch(tokens, tokens, index=0), terms=settings.batch_tokens)
        after_first = memory.now
        memory.take_peak()
        engine.forward_backward(MicroBatch(tokens, tokens, index=0), terms=settings.batch_tokens)
        reducing = memory.take_peak()
        engine.step(1.0)
        updating = memory.take_peak()
    return Counted(started=started, kept=kept, after_first=after_first, reducing=reducing, updating=updating)
