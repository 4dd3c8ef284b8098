"""What a replica reports about its load, and what follows from it for the replica alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ray_ds.serve.requests import EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLoad:
    """The part of `EngineStats` that scaling follows; field names are the names of the reported metrics.

    Numbers are floats, as they come back from Ray Serve.
    """

    num_running: float
    num_waiting: float
    num_waiting_tokens: float
    num_cached_tokens: float
    num_cache_tokens: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    num_tokens: float
    num_prompt_tokens: float
    num_prefix_hits: float


METRICS = tuple(field.name for field in fields(ReplicaLoad))


def report_load(stats: EngineStats) -> dict[str, float]:
    """Return what a replica reports."""
    return {name: float(getattr(stats, name)) for name in METRICS}


def read_load(metrics: Mapping[str, float]) -> ReplicaLoad | None:
    """Return the load in a replica's metrics, or None where they lack a part of it, as those of an older version do."""
    if any(name not in metrics for name in METRICS):
        return None
    return ReplicaLoad(**{name: metrics[name] for name in METRICS})


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadWindow:
    """A replica's load over the last seconds."""

    first: ReplicaLoad
    last: ReplicaLoad
    start_s: float
    """When `first` was reported, in seconds since 1970."""
    end_s: float
    """When `last` was."""

    @property
    def num_requests(self) -> float:
        """Requests it holds, running or waiting."""
        return self.last.num_running + self.last.num_waiting

    @property
    def cache_use(self) -> float:
        """Part of the cache that running and waiting requests want; above 1 where they want more than there is."""
        if self.last.num_cache_tokens <= 0:
            return 0.0
        return (self.last.num_cached_tokens + self.last.num_waiting_tokens) / self.last.num_cache_tokens

    @property
    def prefill_use(self) -> float:
        """Part of the time that computing prompts takes: tokens computed a second over tokens it can compute a second.

        At most 1: a replica with more prompts than it can compute shows that in `predicted_ttft_s`.
        """
        seconds = self.end_s - self.start_s
        if seconds <= 0 or self.last.prefill_tokens_per_s <= 0:
            return 0.0
        computed = (self.last.num_prompt_tokens - self.first.num_prompt_tokens) - (
            self.last.num_prefix_hits - self.first.num_prefix_hits
        )
        return min(1.0, max(0.0, computed) / seconds / self.last.prefill_tokens_per_s)

    @property
    def predicted_ttft_s(self) -> float:
        """Seconds until a request that comes now would get its first token.

        The prompts before it must be computed. Where requests wait for a place, answers must end first: the waiting
        prompts will have as many answer tokens for each prompt token as those before had.
        """
        last = self.last
        if last.prefill_tokens_per_s <= 0:
            return 0.0
        seconds = last.num_waiting_tokens / last.prefill_tokens_per_s
        if last.num_waiting and last.decode_tokens_per_s > 0 and last.num_prompt_tokens > 0:
            answer_tokens = last.num_waiting_tokens * last.num_tokens / last.num_prompt_tokens
            seconds += answer_tokens / last.decode_tokens_per_s
        return seconds


def window_of(series: Mapping[str, Sequence[tuple[float, float]]]) -> LoadWindow | None:
    """Return what a replica reported, or None where it reports no load.

    Args:
        series: by metric, (seconds since 1970, value), oldest first.
    """
    points = {name: series[name] for name in METRICS if series.get(name)}
    first = read_load({name: values[0][1] for name, values in points.items()})
    last = read_load({name: values[-1][1] for name, values in points.items()})
    if first is None or last is None:
        return None
    times = [at_s for at_s, _ in points["num_running"]]
    return LoadWindow(first=first, last=last, start_s=times[0], end_s=times[-1])
