"""Engines in groups of processes, and what they do over some steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ray_ds.config.train import TrainSettings
from ray_ds.model.decoder import Decoder, LossWeights
from ray_ds.model.documents import number_documents
from ray_ds.model.initial import init_weights
from ray_ds.model.router import Gate
from ray_ds.train.objective import MicroBatch, NextTokenObjective
from tests.train.runs import VOCAB_SIZE, make_settings
from tests.train.zero.worlds import WholeState, gather, grid

MODELS: dict[str, dict[str, Any]] = {
    "mla": {"preset": "tiny", "num_attention_heads": 4, "n_routed_experts": 0, "num_nextn_predict_layers": 1},
    "gqa": {
        "preset": "tiny",
        "n_routed_experts": 0,
        "num_attention_heads": 4,
        "attention": "gqa",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "qkv_bias": True,
        "qk_norm": True,
        "tie_word_embeddings": True,
    },
    "experts": {"preset": "tiny", "num_attention_heads": 4, "num_nextn_predict_layers": 1},
    "gqa-experts": {
        "preset": "tiny",
        "num_attention_heads": 4,
        "attention": "gqa",
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
BOS = 0


@dataclass(frozen=True)
class Outcome:
    """What an engine did."""

    curve: list[tuple[float, ...]]
    """What is minimised, the other figures and the gradient's norm, of each step."""
    first: WholeState
    """After the first step: `exp_avg` is a tenth of the clipped gradient."""
    last: WholeState
    load: list[list[int]]
    """Tokens by expert and layer, of all steps."""
    weights: dict[str, torch.Tensor]
    """The whole model, as it is exported."""
    validation: float


def group_settings(model: str, **changes: Any) -> TrainSettings:
    rates = {"optimizer": {"kind": "adamw", "lr": 1e-3}, "schedule": {"warmup_steps": 2}}
    return make_settings(**{"model": MODELS[model], "num_workers": 4, **rates, **changes})


def new_engine(settings: TrainSettings, seed: int, world_size: int) -> Any:
    from ray_ds.train.zero.engine import Engine

    weights = LossWeights(prediction=settings.prediction_weight or 0.0, balance=(settings.balance_weight or 0.0) * 100)
    config = settings.model.resolve(VOCAB_SIZE, settings.seq_len)
    decoder = Decoder(config, recompute_activations=settings.recompute_activations, weights=weights)
    init_weights(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, Gate) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.normal_(0, 0.01, generator=generator)
    return Engine(NextTokenObjective(decoder), settings, device=torch.device("cpu"), world_size=world_size)


def micro_batch(rows: torch.Tensor) -> MicroBatch:
    """Return rows of two documents each, (B, T + 1), as a micro-batch of a step."""
    rows = rows.clone()
    rows[:, 5] = BOS
    return MicroBatch(rows[:, :-1], rows[:, 1:], number_documents(rows[:, :-1], BOS), rows[:, 1:].numel(), index=0)


def run_step(engine: Any, step: int) -> tuple[float, ...]:
    """Train on a step's 4 micro-batches; return what is minimised, the other figures and the gradient's norm."""
    rows, mesh = grid(step), engine.mesh
    terms = rows[..., 1:].numel()
    mine = rows.tensor_split(mesh.num_readers)[mesh.reader]
    sums = torch.stack([engine.forward_backward(micro_batch(part), terms=terms) for part in mine]).sum(dim=0)
    dist.all_reduce(sums)
    return (*(sums / terms).tolist(), engine.step(1.0).grad_norm)


def validate(engine: Any) -> float:
    """Return the summed loss of one micro-batch that is not trained on."""
    loss = engine.loss(micro_batch(grid(99)[0]))  # by all processes, or this one's share of its group's
    dist.all_reduce(loss)
    return float(loss) / engine.mesh.num_readers


def run(settings: TrainSettings, num_steps: int, world_size: int) -> Outcome:
    """Train an engine for some steps."""
    from ray_ds.model.balance import expert_load

    engine = new_engine(settings, 0, world_size)
    curve = [run_step(engine, 0)]
    first = gather(engine.state())
    curve += [run_step(engine, step) for step in range(1, num_steps)]
    load = expert_load(engine.decoder).clone()
    dist.all_reduce(load)
    return Outcome(curve, first, gather(engine.state()), load.tolist(), engine.full_state(), validate(engine))


def save(value: Any, path: Path) -> None:
    """Write a file that all processes may read from now on."""
    if dist.get_rank() == 0:
        torch.save(value, path)
    dist.barrier()


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)
