"""Requests over time, the same for every policy."""

import random
from collections.abc import Callable, Iterator

from jobs.bench.autoscaling.engine import Request

Rate = Callable[[float], float]
"""From seconds to requests a second."""


def step_load(low: float, high: float, at_s: float) -> Rate:
    """Return a rate that rises once."""
    return lambda now_s: high if now_s >= at_s else low


def ramp(low: float, high: float, start_s: float, end_s: float) -> Rate:
    """Return a rate that rises evenly."""
    return lambda now_s: low + (high - low) * min(1.0, max(0.0, (now_s - start_s) / (end_s - start_s)))


def square_wave(low: float, high: float, period_s: float) -> Rate:
    """Return a rate that is low for half of each period, then high."""
    return lambda now_s: low if now_s % period_s < period_s / 2 else high


def burst(rate: float, start_s: float, end_s: float) -> Rate:
    """Return a rate that is there for a while, with silence before and after."""
    return lambda now_s: rate if start_s <= now_s < end_s else 0.0


def arrivals(rate: Rate, end_s: float, *, prompt_tokens: int, answer_tokens: int, seed: int) -> Iterator[Request]:
    """Yield requests as a Poisson process with this rate; sizes vary evenly by half around those given."""
    generator = random.Random(seed)
    step_s = 0.1
    for i in range(round(end_s / step_s)):
        start_s = i * step_s
        count = _poisson(generator, rate(start_s) * step_s)
        for arrival_s in sorted(start_s + generator.random() * step_s for _ in range(count)):
            yield Request(
                arrival_s=arrival_s,
                prompt_tokens=round(prompt_tokens * generator.uniform(0.5, 1.5)),
                answer_tokens=round(answer_tokens * generator.uniform(0.5, 1.5)),
            )


def _poisson(generator: random.Random, mean: float) -> int:
    """Return how many events of a Poisson process fall into a step; `mean` is how many do on average."""
    count, left = 0, generator.expovariate(1.0)
    while left < mean:
        count += 1
        left += generator.expovariate(1.0)
    return count
