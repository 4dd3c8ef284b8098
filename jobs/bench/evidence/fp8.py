"""Products in FP8, those of experts included, cost no more loss than another seed does."""

import dataclasses
import statistics

from jobs.bench.evidence.case import Finding, Setting
from jobs.bench.evidence.shakespeare import LATENT
from jobs.bench.evidence.training import Recipe, Trainer, train, validation_nats
from ray_ds.model import Decoder, init_weights
from ray_ds.model.experts import Experts, MoE
from ray_ds.model.fp8 import Fp8Experts, to_fp8

MODEL = dataclasses.replace(
    LATENT,
    num_hidden_layers=4,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    first_k_dense_replace=1,
)
RECIPE = Recipe(steps=2000, rows=16, seq_len=256, lr=6e-4)
SEEDS = (0, 1, 2)
LAST = 0.05
"""Part of the steps, the last, over which the training loss is averaged."""


def run(setting: Setting) -> Finding:
    """Train in bf16 and in FP8 with each seed, which makes first weights and rows."""
    runs = {
        name: [train_once(setting, seed, f"fp8 {name} {seed}", is_fp8=name == "fp8") for seed in SEEDS]
        for name in ("bf16", "fp8")
    }
    figures: dict[str, object] = {"runs": runs}
    claims = {}
    for kind in ("training_nats", "validation_nats"):
        plain, fp8 = ([found[kind] for found in runs[name]] for name in ("bf16", "fp8"))
        worse = statistics.fmean(fp8) - statistics.fmean(plain)
        noise = max(plain) - min(plain)
        figures[kind] = {"fp8_above_bf16": worse, "between_seeds": noise}
        claims[f"{kind}: FP8's mean is above that of bf16 by no more than seeds are apart"] = worse <= noise
    return Finding(figures=figures, claims=claims)


def train_once(setting: Setting, seed: int, label: str, *, is_fp8: bool) -> dict[str, float]:
    """Return a run's losses."""
    recipe = setting.recipe(RECIPE)
    decoder = Decoder(setting.model(MODEL))
    init_weights(decoder, seed)
    if is_fp8:
        all_to_fp8(decoder, setting)
    trainer = Trainer(decoder, recipe, setting.device)
    losses = train(trainer, setting.corpus.train, seed=seed, label=label)
    validation = validation_nats(decoder, setting.corpus.validation, recipe.seq_len)
    return {
        "training_nats": statistics.fmean(losses[-max(1, int(LAST * recipe.steps)) :]),
        "validation_nats": validation,
    }


def all_to_fp8(decoder: Decoder, setting: Setting) -> None:
    """Have all layers multiply in FP8, also experts that are too narrow to gain by it."""
    to_fp8(decoder.model.layers, setting.device)
    for module in list(decoder.modules()):
        if isinstance(module, MoE) and type(module.experts) is Experts:
            module.experts = Fp8Experts.of(module.experts)
