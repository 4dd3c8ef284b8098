"""Moving the routers' biases keeps experts equally busy (arXiv 2408.15664), against runs in which they stay."""

import dataclasses
import statistics

import torch
from torch import Tensor

from jobs.bench.evidence.case import Finding, Setting
from jobs.bench.evidence.training import Recipe, Trainer, train, validation_nats
from ray_ds.config.model import ModelConfig
from ray_ds.model import Decoder, init_weights, max_violation

MODEL = ModelConfig(
    vocab_size=65,
    max_position_embeddings=256,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=640,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
)
RECIPE = Recipe(steps=1000, rows=32, seq_len=256)
SPEEDS = {"balanced": 1e-3, "ablation": 0.0}
"""What the biases move by in a step: DeepSeek-V3's, and not at all. Neither run has another balancing loss."""
SEEDS = (0, 1, 2)
LAST = 0.1
"""Part of the steps, the last, whose violation counts."""


def run(setting: Setting) -> Finding:
    """Train with each speed and seed; compare the mean over layers of the maximum violation at the end."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, speed in SPEEDS.items():
        runs[name] = [train_once(setting, speed, seed, f"balance {name} {seed}") for seed in SEEDS]
    pairs = list(zip(*(runs[name] for name in SPEEDS), strict=True))
    claims = {
        "every seed: the violation is lower than in the ablation": all(
            ours["max_violation"] < theirs["max_violation"] for ours, theirs in pairs
        )
    }
    means = {name: statistics.fmean(found["max_violation"] for found in runs[name]) for name in runs}
    return Finding(figures={"max_violation": means, "runs": runs}, claims=claims)


def train_once(setting: Setting, speed: float, seed: int, label: str) -> dict[str, float]:
    """Return a run's figures."""
    recipe = dataclasses.replace(setting.recipe(RECIPE), router_bias_speed=speed)
    decoder = Decoder(setting.model(MODEL))
    init_weights(decoder, seed)
    trainer = Trainer(decoder, recipe, setting.device)
    loads: list[Tensor] = []
    train(
        trainer,
        setting.corpus.train,
        seed=seed,
        label=label,
        after_step=lambda _: loads.append(max_violation(trainer.load)),
    )
    last = torch.stack(loads)[-max(1, int(LAST * recipe.steps)) :]  # (steps, MoE layers)
    validation = validation_nats(decoder, setting.corpus.validation, recipe.seq_len)
    return {"max_violation": float(last.mean()), "validation_nats": validation}
