"""The plan's bytes of weights, gradients and optimizer state against the tensors of real DeepSpeed engines."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.config.train import TrainSettings
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.plan import states as states_module
from ray_ds.plan.case import Case, case_of
from ray_ds.plan.states import States, states_of
from ray_ds.train.objective import MicroBatch, NextTokenObjective
from tests.plan.live_memory import LiveMemory
from tests.train.runs import make_settings
from tests.train.zero.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VOCAB_SIZE, SEQ_LEN, MICRO_BATCH, MICRO_BATCHES = 2048, 16, 1, 2
BUCKET_NUMEL = 500_000
"""A tenth of the model, as DeepSpeed's 500 million are of a model with 5 billion parameters."""
Key = tuple[int, str, str]
"""Stage, precision and optimizer."""
EVERY_STAGE: list[Key] = [(stage, "bf16", "adamw") for stage in (0, 1, 2, 3)]
CASES: dict[int, list[Key]] = {
    1: [*EVERY_STAGE, *((stage, "bf16", "muon") for stage in (0, 1, 2, 3)), (1, "fp32", "adamw")],
    2: [*EVERY_STAGE, (1, "bf16", "muon")],
}
"""By the number of workers."""


@dataclass(frozen=True)
class Counted:
    """Bytes of live tensors in the second of two steps; activations are a few thousandths of them."""

    started: int
    kept: int
    after_first: int
    """Between the step's two micro-batches."""
    reducing: int
    updating: int


def settings_of(key: Key, world_size: int) -> TrainSettings:
    stage, precision, optimizer = key
    return make_settings(
        model={"preset": "demo", "num_hidden_layers": 6},
        seq_len=SEQ_LEN,
        micro_batch=MICRO_BATCH,
        batch_tokens=SEQ_LEN * MICRO_BATCH * MICRO_BATCHES * world_size,
        zero_stage=stage,
        precision=precision,
        optimizer={"kind": optimizer},
        gradient_clipping=0.0 if optimizer == "muon" else 1.0,
        num_workers=world_size,
    )


def case_for(key: Key, world_size: int) -> Case:
    settings = settings_of(key, world_size)
    return case_of(settings, settings.model.resolve(VOCAB_SIZE, SEQ_LEN), world_size)


def count_cases(rank: int, world_size: int, folder: Path) -> None:
    counted = {key: count_case(key, world_size) for key in CASES[world_size]}
    if rank == 0:
        torch.save(counted, folder / f"{world_size}.pt")


def count_case(key: Key, world_size: int) -> Counted:
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
            return run_two_steps(settings_of(key, world_size), world_size, engine_module, memory)


def run_two_steps(settings: TrainSettings, world_size: int, engine_module: Any, memory: LiveMemory) -> Counted:
    decoder = Decoder(settings.model.resolve(VOCAB_SIZE, SEQ_LEN))
    init_weights(decoder, 0)
    memory.take_peak()
    engine = engine_module.Engine(
        NextTokenObjective(decoder), settings, device=torch.device("cpu"), world_size=world_size
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


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Mapping[Key, Counted]]:
    folder = tmp_path_factory.mktemp("worlds")
    found = {}
    for world_size in CASES:
        run_world(world_size, count_cases, folder)
        found[world_size] = torch.load(folder / f"{world_size}.pt", weights_only=False)
    return found


@pytest.fixture
def small_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "BUCKET_NUMEL", BUCKET_NUMEL)


def planned(key: Key, world_size: int) -> States:
    return states_of(case_for(key, world_size))


cases = pytest.mark.parametrize(
    ("world_size", "key"),
    [(world_size, key) for world_size, keys in CASES.items() for key in keys],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else f"{value}workers",
)


@cases
@pytest.mark.usefixtures("small_bucket")
@pytest.mark.shows("The plan's memory of weights, gradients and optimizer is that of real DeepSpeed engines, ZeRO 0-3")
def test_kept_between_steps(counted: Any, world_size: int, key: Key) -> None:
    assert planned(key, world_size).kept == pytest.approx(counted[world_size][key].kept, rel=0.02)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_update(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    assert states.kept + states.updating == pytest.approx(counted[world_size][key].updating, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_last_backward_pass(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    running = states.kept + states.gathered + states.earlier_gradients
    most = max(running, states.kept + states.reducing)
    assert most == pytest.approx(counted[world_size][key].reducing, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_gradients_of_earlier_micro_batches(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    assert states.kept + states.earlier_gradients == pytest.approx(counted[world_size][key].after_first, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_start(counted: Any, world_size: int, key: Key) -> None:
    assert planned(key, world_size).starting == pytest.approx(counted[world_size][key].started, rel=0.1)
