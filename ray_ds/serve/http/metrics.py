"""What Prometheus is told, under vLLM's names, so that its dashboards and alerts work unchanged.

A registry belongs to one service, so `/metrics` speaks of the replica that answers: behind a proxy of several replicas
a scrape reads one of them.
Source of names and buckets: vLLM's vllm/v1/metrics/loggers.py.
"""

import time
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ray_ds.serve.requests import EngineStats, FinishReason

LABEL = "model_name"
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Requests that are being answered.", lambda stats: stats.num_running),
    "vllm:num_requests_waiting": ("Requests that wait for their turn.", lambda stats: stats.num_waiting),
    "vllm:kv_cache_usage_perc": (
        "Share of the cache that running requests use; 1 = all of it.",
        lambda stats: stats.num_cached_tokens / stats.num_cache_tokens,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:prompt_tokens": ("Prompt tokens taken in.", lambda stats: stats.num_prompt_tokens),
    "vllm:generation_tokens": ("Tokens sampled.", lambda stats: stats.num_tokens),
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the cache.", lambda stats: stats.num_prompt_tokens),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", lambda stats: stats.num_prefix_hits),
    "vllm:num_preemptions": ("Running requests that gave their place away.", lambda stats: stats.num_preemptions),
}


class ServingMetrics:
    """The figures of one model: the engine's own at the moment of a scrape, and how long requests took."""

    def __init__(self, model_id: str, read_stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(model_id, read_stats))
        self.time_to_first_token = self._histogram("time_to_first_token", TTFT_BUCKETS, model_id)
        self.inter_token_latency = self._histogram("inter_token_latency", ITL_BUCKETS, model_id)
        self.e2e_request_latency = self._histogram("e2e_request_latency", E2E_BUCKETS, model_id)
        self._model_id = model_id
        self._finished = Counter(
            "vllm:request_success", "Requests that ended.", [LABEL, "finished_reason"], registry=self.registry
        )

    def _histogram(self, name: str, buckets: tuple[float, ...], model_id: str) -> Histogram:
        text = f"{name.replace('_', ' ').capitalize()} in seconds."
        return Histogram(f"vllm:{name}_seconds", text, [LABEL], buckets=buckets, registry=self.registry).labels(
            model_id
        )

    def count_end(self, reason: FinishReason | Literal["abort", "error"]) -> None:
        """Count a request that has ended."""
        self._finished.labels(self._model_id, reason).inc()

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineFigures:
    """Reads the engine when Prometheus asks, and not before."""

    def __init__(self, model_id: str, read_stats: Callable[[], EngineStats]) -> None:
        self._model_id = model_id
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        """Yield every figure of the engine."""
        stats = self._read_stats()
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=[LABEL])
            gauge.add_metric([self._model_id], read(stats))
            yield gauge
        for name, (text, read) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[LABEL])
            counter.add_metric([self._model_id], read(stats))
            yield counter


class RequestTimer:
    """Times one request from its arrival to its end."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self._metrics = metrics
        self._arrived = self._last = time.monotonic()
        self._has_tokens = False
        self._is_over = False

    def add_tokens(self, num_tokens: int) -> None:
        """Take tokens that came just now. Several at once, held back together, share the time since those before."""
        now = time.monotonic()
        if num_tokens and not self._has_tokens:
            self._metrics.time_to_first_token.observe(now - self._arrived)
            self._has_tokens = True
            num_tokens -= 1
        for _ in range(num_tokens):
            self._metrics.inter_token_latency.observe((now - self._last) / num_tokens)
        self._last = now

    def end(self, reason: FinishReason | Literal["abort", "error"]) -> None:
        """Count the request as ended; only the first end counts."""
        if not self._is_over:
            self._is_over = True
            self._metrics.count_end(reason)
            self._metrics.e2e_request_latency.observe(time.monotonic() - self._arrived)
