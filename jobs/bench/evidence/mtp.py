"""Multi-token prediction learns the character after the next one, and the model itself is none the worse for it."""

import dataclasses
import statistics

from jobs.bench.evidence.balance import MODEL
from jobs.bench.evidence.case import Finding, Setting
from jobs.bench.evidence.corpus import bigram_nats, unigram_nats
from jobs.bench.evidence.training import Recipe, Trainer, prediction_nats, train, validation_nats
from ray_ds.model import Decoder, init_weights
from ray_ds.model.decoder import LossWeights

RECIPE = Recipe(steps=1000, rows=32, seq_len=256)
PREDICTION_WEIGHT = 0.3
"""DeepSeek-V3's for most of its tokens (arXiv 2412.19437, section 4.2)."""
SEEDS = (0, 1, 2)


def run(setting: Setting) -> Finding:
    """Train with and without one prediction module, with each seed."""
    corpus = setting.corpus
    runs = {
        name: [train_once(setting, modules, seed, f"mtp {name} {seed}") for seed in SEEDS]
        for name, modules in (("without", 0), ("with", 1))
    }
    bounds = {"unigram_nats": unigram_nats(corpus), "bigram_nats": bigram_nats(corpus)}
    without, with_module = ([found["validation_nats"] for found in runs[name]] for name in ("without", "with"))
    worse, noise = statistics.fmean(with_module) - statistics.fmean(without), max(without) - min(without)
    heads = [found["prediction_nats"] for found in runs["with"]]
    claims = {
        "every seed: the module's loss is below that of single characters": max(heads) < bounds["unigram_nats"],
        "every seed: the module's loss is below that of pairs of characters": max(heads) < bounds["bigram_nats"],
        "the model's own mean loss rises by no more than seeds are apart": worse <= noise,
    }
    return Finding(figures={**bounds, "with_above_without": worse, "between_seeds": noise, "runs": runs}, claims=claims)


def train_once(setting: Setting, modules: int, seed: int, label: str) -> dict[str, float]:
    """Return a run's validation losses."""
    recipe = setting.recipe(RECIPE)
    config = dataclasses.replace(setting.model(MODEL), num_nextn_predict_layers=modules)
    decoder = Decoder(config, weights=LossWeights(prediction=PREDICTION_WEIGHT if modules else 0.0))
    init_weights(decoder, seed)
    trainer = Trainer(decoder, recipe, setting.device)
    train(trainer, setting.corpus.train, seed=seed, label=label)
    text = setting.corpus.validation
    found = {"validation_nats": validation_nats(decoder, text, recipe.seq_len)}
    if modules:
        found["prediction_nats"] = prediction_nats(decoder, text, recipe.seq_len)
    return found
