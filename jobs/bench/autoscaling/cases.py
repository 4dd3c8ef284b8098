"""What is simulated: loads that autoscalers get wrong, each with our policy and with Serve's own."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import JsonValue
from ray.serve.config import AutoscalingConfig

from jobs.bench.autoscaling.engine import EngineSpeed
from jobs.bench.autoscaling.simulated_serve import Scaling, ServeTimes, SimulatedServe
from jobs.bench.autoscaling.traffic import Rate, arrivals, burst, ramp, square_wave, step_load
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.on_ray.autoscaling import autoscaling_config

SPEED = EngineSpeed()
PROMPT_TOKENS, ANSWER_TOKENS = 200, 60
CAPACITY = SPEED.capacity(PROMPT_TOKENS, ANSWER_TOKENS)
"""Requests a second that one replica can answer."""
POLICIES = ("tokens", "ongoing_requests", "serve_defaults")
"""Ours; Serve's with our delays; Serve's as it comes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A load."""

    name: str
    rate: Rate
    end_s: float
    load_steps: int
    """How often the load changes for good."""
    load_ends_s: float | None = None
    """From when on nothing arrives any more."""
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    min_replicas: int = 1
    max_replicas: int = 8
    phantom_requests: int = 0
    stock_changes: Mapping[str, float] = field(default_factory=dict)
    """What the case changes in the config of Serve's own policy."""


CASES = (
    Case(name="step", rate=step_load(0.4 * CAPACITY, 1.6 * CAPACITY, 60), end_s=300, load_steps=1),
    Case(name="large_step", rate=step_load(0.5 * CAPACITY, 4 * CAPACITY, 60), end_s=300, load_steps=1),
    Case(name="ramp", rate=ramp(0.3 * CAPACITY, 4 * CAPACITY, 60, 240), end_s=420, load_steps=1),
    Case(name="square_wave", rate=square_wave(0.4 * CAPACITY, 1.6 * CAPACITY, 60), end_s=600, load_steps=20),
    Case(name="slow_square_wave", rate=square_wave(0.4 * CAPACITY, 1.6 * CAPACITY, 300), end_s=900, load_steps=6),
    Case(
        name="long_prompts",
        rate=square_wave(0.6, 2.4, 300),
        end_s=900,
        load_steps=6,
        prompt_tokens=600,
        answer_tokens=5,
    ),
    Case(  # ray#61551: streams end, and Serve's count of open requests does not go back
        name="streams_drain",
        rate=burst(0.5, 30, 60),
        load_ends_s=60,
        end_s=300,
        load_steps=2,
        answer_tokens=500,
        phantom_requests=6,
    ),
    Case(  # ray#63279: a low target and a gain of 10 that drives the number between its bounds
        name="oscillation",
        rate=step_load(0.0, 1.5 * CAPACITY, 30),
        end_s=600,
        load_steps=1,
        max_replicas=20,
        stock_changes={"target_ongoing_requests": 0.5, "upscaling_factor": 10.0, "downscale_delay_s": 10.0},
    ),
    Case(name="zero", rate=burst(0.5, 60, 120), load_ends_s=120, end_s=600, load_steps=2, min_replicas=0),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy made of a case."""

    case: str
    policy: str
    requests: int
    ttft_met: float
    """Part of all requests whose first token came within the target."""
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float
    cut_off: int
    direction_changes: int
    load_steps: int
    most_replicas: int
    replica_seconds: float
    reacted_s: float | None
    """From the first change of the load to the first more replicas that were wanted."""
    back_to_minimum_s: float | None
    """From the end of the last answer to the time from which the minimum was wanted; None: never, or load goes on."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return it with rounded numbers."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def make_config(case: Case, policy: str) -> AutoscalingConfig:
    """Return what Serve is told."""
    bounds = {"min_replicas": case.min_replicas, "max_replicas": case.max_replicas}
    if policy == "serve_defaults":
        return AutoscalingConfig(**bounds, **case.stock_changes)
    to_zero = {"downscale_to_zero_delay_s": 60.0} if case.min_replicas == 0 else {}
    stock = AutoscalingSettings(**bounds, **to_zero, policy=policy)  # type: ignore[arg-type]
    config = autoscaling_config(ServeSettings(autoscaling=stock, max_running_requests=SPEED.max_running_requests))
    return config if policy == "tokens" else config.model_copy(update=dict(case.stock_changes))


def simulate(case: Case, policy: str, times: ServeTimes, *, target_ttft_s: float = 1.0, seed: int = 0) -> Outcome:
    """Run a case; the same seed gives the same requests whatever the policy."""
    serve = SimulatedServe(make_config(case, policy), SPEED, times, phantom_requests=case.phantom_requests, seed=seed)
    sizes = {"prompt_tokens": case.prompt_tokens, "answer_tokens": case.answer_tokens}
    serve.run(arrivals(case.rate, case.end_s, seed=seed, **sizes), case.end_s)
    # Those of the last seconds may still be waiting when the simulation ends.
    asked = [request for request in serve.requests if request.arrival_s < case.end_s - 10 * target_ttft_s]
    ttfts = [request.ttft_s if request.ttft_s is not None else case.end_s - request.arrival_s for request in asked]
    return Outcome(
        case=case.name,
        policy=policy,
        requests=len(asked),
        ttft_met=sum(ttft <= target_ttft_s for ttft in ttfts) / len(ttfts),
        ttft_p50_s=statistics.median(ttfts),
        ttft_p99_s=statistics.quantiles(ttfts, n=100)[98],
        ttft_max_s=max(ttfts),
        cut_off=sum(request.is_cut_off for request in serve.requests),
        direction_changes=direction_changes(serve.scalings),
        load_steps=case.load_steps,
        most_replicas=max(scaling.target for scaling in serve.scalings),
        replica_seconds=serve.replica_seconds,
        reacted_s=_reacted_s(case, serve.scalings),
        back_to_minimum_s=_back_to_minimum_s(case, serve),
    )


def direction_changes(scalings: Sequence[Scaling]) -> int:
    """Return how often the number of replicas began to fall after it had risen, or the other way round."""
    targets = [scaling.target for scaling in scalings]
    is_up = [after > before for before, after in itertools.pairwise(targets)]
    return sum(one != other for one, other in itertools.pairwise(is_up))


def _reacted_s(case: Case, scalings: Sequence[Scaling]) -> float | None:
    low = case.rate(0.0)
    changed_s = next(tick / 10 for tick in range(round(case.end_s * 10)) if case.rate(tick / 10) > low)
    ups = [
        after.at_s - changed_s
        for before, after in itertools.pairwise(scalings)
        if after.target > before.target and after.at_s >= changed_s
    ]
    return ups[0] if ups else None


def _back_to_minimum_s(case: Case, serve: SimulatedServe) -> float | None:
    last = serve.scalings[-1]
    if case.load_ends_s is None or last.target != case.min_replicas:
        return None
    return last.at_s - max(request.finished_s for request in serve.requests if request.finished_s is not None)
