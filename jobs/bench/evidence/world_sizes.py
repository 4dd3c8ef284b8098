"""In bf16 with experts, runs on different numbers of workers come no further apart than rounding alone takes them.

Workers are emulated on one GPU: a step's micro-batches are dealt out in as many shares, and gradients added up within
each share and then over the shares, in bf16. The control is one worker that takes the micro-batches in another order.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence

import torch

from jobs.bench.evidence.balance import MODEL
from jobs.bench.evidence.case import Finding, Setting
from jobs.bench.evidence.corpus import random_rows
from jobs.bench.evidence.training import MicroBatch, Recipe, Trainer
from ray_ds.model import Decoder, init_weights

RECIPE = Recipe(steps=200, rows=8, seq_len=256, warmup_steps=20)
"""Rows are those of a micro-batch."""
NUM_MICRO_BATCHES = 8
WORLD_SIZES = (2, 3, 4, 6)
NUM_CONTROLS = 6
Curve = list[float]


def run(setting: Setting) -> Finding:
    """Compare each number of workers with all controls, and these with each other."""
    started = time.perf_counter()
    controls = [train_once(setting, world_size=1, permutation=0)]
    rest_s = (time.perf_counter() - started) * (NUM_CONTROLS - 1 + len(WORLD_SIZES))
    print(f"world_sizes {rest_s:.0f} s to go", flush=True)
    controls += [train_once(setting, world_size=1, permutation=number) for number in range(1, NUM_CONTROLS)]
    between = [distance(one, other) for one, other in itertools.combinations(controls, 2)]
    allowed = max(between)
    figures: dict[str, object] = {"controls_apart_at_most": allowed, "controls_apart": statistics.fmean(between)}
    claims = {}
    for world_size in WORLD_SIZES:
        curve = train_once(setting, world_size=world_size, permutation=0)
        found = statistics.fmean(distance(curve, control) for control in controls)
        figures[f"{world_size}_workers_apart"] = found
        claims[f"{world_size} workers: no further from the controls than these are from each other"] = found <= allowed
        print(f"world_sizes {world_size} workers: {found:.2e} apart; controls: {allowed:.2e}", flush=True)
    return Finding(figures={**figures, "losses": [controls[0][0], controls[0][-1]]}, claims=claims)


def train_once(setting: Setting, *, world_size: int, permutation: int) -> Curve:
    """Return the losses of a run; permutation 0 leaves the micro-batches in their order."""
    recipe = setting.recipe(RECIPE)
    decoder = Decoder(setting.model(MODEL))
    init_weights(decoder, seed=0)
    trainer = Trainer(decoder, recipe, setting.device)
    decoder.train()
    generator, orders = torch.Generator().manual_seed(0), torch.Generator().manual_seed(permutation)
    losses = []
    for _ in range(recipe.steps):
        grid = [
            random_rows(setting.corpus.train, recipe.rows, recipe.seq_len, generator) for _ in range(NUM_MICRO_BATCHES)
        ]
        if permutation:
            grid = [grid[place] for place in torch.randperm(len(grid), generator=orders).tolist()]
        losses.append(trainer.step(deal_out(grid, world_size)))
    return list(torch.stack(losses).tolist())


def deal_out(grid: Sequence[MicroBatch], world_size: int) -> list[list[MicroBatch]]:
    """Return a run of neighbouring micro-batches for each worker, the first ones' the longer where they are uneven."""
    least, more = divmod(len(grid), world_size)
    ends = list(itertools.accumulate([least + (rank < more) for rank in range(world_size)], initial=0))
    return [list(grid[start:end]) for start, end in itertools.pairwise(ends)]


def distance(one: Curve, other: Curve) -> float:
    """Return the root mean square of the relative differences of two runs' losses."""
    return math.sqrt(statistics.fmean(((a - b) / b) ** 2 for a, b in zip(one, other, strict=True)))
