"""DeepSpeed's stages against each other and against plain torch, on two processes over gloo."""

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from ray_ds.config.train import TrainSettings
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from tests.train.runs import VOCAB_SIZE, make_settings

WORLD_SIZE = 2
STEPS = 3
CASES = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("adamw", "muon")))


def case_settings(stage: int, precision: str, optimizer: str) -> TrainSettings:
    kinds: dict[str, dict[str, Any]] = {
        "adamw": {"optimizer": {"kind": "adamw", "lr": 0.01}, "gradient_clipping": 1.0},
        "muon": {"optimizer": {"kind": "muon"}, "gradient_clipping": 0.0},
    }
    return make_settings(zero_stage=stage, precision=precision, **kinds[optimizer])


def grid(step: int) -> torch.Tensor:
    """Return a step's 4 micro-batches of 4 rows."""
    return torch.randint(VOCAB_SIZE, (4, 4, 17), generator=torch.Generator().manual_seed(step))


def new_decoder(settings: TrainSettings, seed: int) -> Decoder:
    decoder = Decoder(settings.model.resolve(VOCAB_SIZE, settings.seq_len))
    init_weights(decoder, seed)
    return decoder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and gradient norms of every case: six steps in a row, and the last three again from a checkpoint."""
    folder = tmp_path_factory.mktemp("zero")
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    multiprocessing.spawn(run_cases, (str(folder),), nprocs=WORLD_SIZE)
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return loaded


def run_cases(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    from ray_ds.train.zero.engine import Engine

    found = {}
    for case in CASES:
        settings, name = case_settings(*case), "-".join(map(str, case))
        engine = Engine(new_decoder(settings, 0), settings, device=torch.device("cpu"), world_size=WORLD_SIZE)
        first = run_steps(engine, rank, range(STEPS))
        engine.save(Path(folder) / name)
        second = run_steps(engine, rank, range(STEPS, 2 * STEPS))
        state = engine.full_state()
        engine = Engine(new_decoder(settings, 1), settings, device=torch.device("cpu"), world_size=WORLD_SIZE)
        engine.load(Path(folder) / name)
        resumed = run_steps(engine, rank, range(STEPS, 2 * STEPS))
        kinds = sorted({str(value.dtype) for value in state.values()})
        found[name] = {"first": first, "second": second, "resumed": resumed, "dtypes": kinds, "names": sorted(state)}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(found))


def run_steps(engine: Any, rank: int, steps: range) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of some steps."""
    out = []
    for step in steps:
        total = torch.zeros(())
        for rows in grid(step).chunk(WORLD_SIZE)[rank]:
            total += engine.forward_backward(rows[:, :-1], rows[:, 1:])
        torch.distributed.all_reduce(total)
        out.append((float(total) / 256, engine.step(1.0).grad_norm))
    return out


@functools.cache
def plain_torch_adamw() -> list[tuple[float, float]]:
    """Train on whole batches in one process without DeepSpeed."""
    decoder = new_decoder(make_settings(), 0)
    matrices = [p for p in decoder.parameters() if p.dim() >= 2]
    vectors = [p for p in decoder.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    out = []
    for step in range(2 * STEPS):
        rows = grid(step).flatten(0, 1)
        loss = decoder(rows[:, :-1], rows[:, 1:]) / 256
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append((loss.item(), norm.item()))
    return out


@pytest.mark.shows("ZeRO 0 to 3 in fp32 train as plain torch does, to 2e-5")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_adamw_is_plain_torch(results: dict[str, Any], stage: int) -> None:
    case = results[f"{stage}-fp32-adamw"]
    expected = plain_torch_adamw()
    torch.testing.assert_close(torch.tensor(case["first"] + case["second"]), torch.tensor(expected), rtol=2e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 3e-3)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stages_agree(results: dict[str, Any], optimizer: str, precision: str, tolerance: float) -> None:
    losses = []
    for stage in (0, 1, 2, 3):
        case = results[f"{stage}-{precision}-{optimizer}"]
        losses.append([loss for loss, _ in case["first"] + case["second"]])
    for stage in (1, 2, 3):
        torch.testing.assert_close(losses[stage], losses[0], rtol=tolerance, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])
def test_checkpoint_continues_bit_by_bit(results: dict[str, Any], case: str) -> None:
    assert results[case]["resumed"] == results[case]["second"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])
def test_state_is_whole_and_keeps_router_biases_in_fp32(results: dict[str, Any], case: str) -> None:
    settings = make_settings()
    assert results[case]["names"] == sorted(new_decoder(settings, 0).state_dict())
    assert results[case]["dtypes"] == (["torch.bfloat16", "torch.float32"] if "bf16" in case else ["torch.float32"])
