"""The settings that train fastest among those that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ray_ds.config.parallel import ZERO_STAGES
from ray_ds.plan.case import Case
from ray_ds.plan.devices import Fleet
from ray_ds.plan.memory import Memory, memory_of
from ray_ds.plan.speed import Speed, speed_of

NEAR = 0.98
"""Plans that differ by less in speed count as equal: no prediction is that good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A case on a fleet."""

    case: Case
    memory: Memory
    speed: Speed
    fits: bool


def plan_of(case: Case, fleet: Fleet) -> Plan:
    """Return what a case needs and gives."""
    memory = memory_of(case)
    fits = memory.needed <= fleet.kind.memory_bytes
    return Plan(case=case, memory=memory, speed=speed_of(case, fleet), fits=fits)


def micro_batches_possible(case: Case) -> list[int]:
    """Return the micro-batches, in rows, that divide the step's batch and leave none of the workers without one."""
    rows = case.batch_tokens // case.seq_len
    return [size for size in range(1, rows // case.num_readers + 1) if rows % size == 0]


def largest_micro_batch(case: Case, fleet: Fleet) -> int:
    """Return the largest possible micro-batch that fits, in rows; 0 = not one row fits."""
    fitting = 0
    for size in micro_batches_possible(case):
        if memory_of(case.with_micro_batch(size)).needed > fleet.kind.memory_bytes:
            break  # memory rises with the micro-batch
        fitting = size
    return fitting


def best_plan(case: Case, fleet: Fleet) -> Plan | None:
    """Return the fastest of the plans that fit, of near equals the one that does least; None = none fits.

    Stages, recomputation and micro-batches are tried; what decides the result of training is left as it is.
    """
    plans = [plan_of(tried, fleet) for tried in _tried(case, fleet)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    fastest = max(plan.speed.tokens_per_s for plan in fitting)
    near = [plan for plan in fitting if plan.speed.tokens_per_s > NEAR * fastest]
    return min(near, key=lambda plan: (plan.case.recompute, plan.case.zero_stage, plan.memory.needed))


def _tried(case: Case, fleet: Fleet) -> Iterator[Case]:
    for stage in ZERO_STAGES:
        for recompute in (False, True):
            tried = replace(case, zero_stage=stage, recompute=recompute)
            if tried.refusal() is not None:
                continue
            largest = largest_micro_batch(tried, fleet)
            for size in micro_batches_possible(tried):
                if largest / 8 <= size <= largest:
                    yield tried.with_micro_batch(size)
