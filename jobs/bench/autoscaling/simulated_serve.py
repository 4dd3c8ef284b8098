"""A simulation of Ray Serve around its real decisions: the state that its controller keeps of a deployment.

Reports, aggregation, policy, delays and bounds are Serve's own code, which is given the simulation's clock. Simulated
are the engines, how long a replica takes to start, how requests are routed, and that streams end before a replica goes.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private import autoscaling_state
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.metrics_utils import QUEUED_REQUESTS_KEY, InMemoryMetricsStore
from ray.serve.config import AutoscalingConfig

from jobs.bench.autoscaling.engine import EngineSpeed, Request, SimulatedEngine
from ray_ds.serve.scaling.load import report_load

DEPLOYMENT = DeploymentID(name="model", app_name="simulated")
CONTROL_LOOP_S = 0.1
"""As Serve's controller."""


@dataclass
class Clock:
    """Stands in for the module `time` in Serve's code."""

    now_s: float = 0.0

    def time(self) -> float:
        """Return the simulation's time."""
        return self.now_s

    def monotonic(self) -> float:
        """Return the simulation's time."""
        return self.now_s


@contextmanager
def serve_with(clock: Clock) -> Iterator[None]:
    """Let Serve's decisions go by this clock."""
    with ExitStack() as stack:
        for module in (autoscaling_state, autoscaling_policy):
            stack.enter_context(mock.patch.object(module, "time", clock))
        yield


@dataclass(frozen=True, kw_only=True)
class ServeTimes:
    """How long things take around the engines."""

    startup_s: float = 3.5
    """From the decision for a replica until it answers."""
    report_delay_s: float = 0.05
    drain_timeout_s: float = 30.0
    silent_s: float = 0.0
    """For how long a new replica reports nothing."""


@dataclass
class Replica:
    """One replica."""

    id: ReplicaID
    engine: SimulatedEngine
    ready_s: float
    metrics: InMemoryMetricsStore = field(default_factory=InMemoryMetricsStore)
    stopped_s: float | None = None
    next_report_s: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """The number of replicas wanted from a time on."""

    at_s: float
    target: int


class SimulatedServe:
    """One deployment and its proxy.

    Args:
        phantom_requests: open requests that the proxy goes on counting once it has routed as many (ray#61551).
    """

    def __init__(
        self,
        config: AutoscalingConfig,
        speed: EngineSpeed,
        times: ServeTimes,
        *,
        phantom_requests: int = 0,
        seed: int = 0,
    ) -> None:
        self.scalings: list[Scaling] = []
        self.requests: list[Request] = []
        self.replica_seconds = 0.0
        self._config, self._speed, self._times = config, speed, times
        self._phantom_requests = phantom_requests
        self._random = random.Random(seed)
        self._clock = Clock()
        self._state = DeploymentAutoscalingState(DEPLOYMENT)
        self._replicas: list[Replica] = []
        self._num_started = 0
        self._queue: deque[Request] = deque()
        self._proxy_metrics = InMemoryMetricsStore()
        self._next_proxy_report_s = 0.0
        self._in_flight: deque[tuple[float, ReplicaMetricReport | HandleMetricReport]] = deque()
        self._target = 0

    def run(self, requests: Iterable[Request], end_s: float) -> None:
        """Simulate from 0 to `end_s`; the first replicas are ready at 0."""
        coming = deque(requests)
        with serve_with(self._clock):
            deployment = DeploymentConfig.from_default(autoscaling_config=self._config)
            info = DeploymentInfo(deployment, None, 0, "")
            self._scale(self._state.register(info, self._config.min_replicas), startup_s=0.0)
            for tick in range(round(end_s / CONTROL_LOOP_S)):
                self._clock.now_s = now_s = tick * CONTROL_LOOP_S
                while coming and coming[0].arrival_s < now_s + CONTROL_LOOP_S:
                    self._receive(coming.popleft())
                self._work()
                self._report()
                self._state.update_running_replica_ids([replica.id for replica in self._running()])
                self._scale(self._state.get_decision_num_replicas(self._target), startup_s=self._times.startup_s)

    def _running(self) -> list[Replica]:
        now_s = self._clock.now_s
        return [replica for replica in self._replicas if replica.stopped_s is None and replica.ready_s <= now_s]

    def _receive(self, request: Request) -> None:
        """Take a request at the proxy; where no replica runs, tell the controller at once, as a Serve handle does."""
        self.requests.append(request)
        self._queue.append(request)
        if not self._running():
            self._report_proxy()

    def _work(self) -> None:
        """Route what waits to the less loaded of two replicas; let all engines work; end what has drained."""
        now_s, running = self._clock.now_s, self._running()
        while self._queue and running:
            some = self._random.sample(running, min(2, len(running)))
            min(some, key=lambda replica: replica.engine.num_requests).engine.submit(self._queue.popleft())
        for replica in self._replicas:
            if replica.ready_s <= now_s:
                replica.engine.step(now_s, CONTROL_LOOP_S)
        for replica in [replica for replica in self._replicas if replica.stopped_s is not None]:
            is_over = now_s - replica.stopped_s >= self._times.drain_timeout_s
            if is_over or not replica.engine.num_requests:
                for request in [*replica.engine.waiting, *replica.engine.running]:
                    request.is_cut_off = True
                self._replicas.remove(replica)
        self.replica_seconds += len(self._replicas) * CONTROL_LOOP_S

    def _report(self) -> None:
        """Let replicas and the proxy report when it is time, and the controller take in what has come."""
        now_s = self._clock.now_s
        for replica in self._running():
            if now_s >= replica.next_report_s and now_s >= replica.ready_s + self._times.silent_s:
                replica.next_report_s = now_s + self._config.metrics_interval_s
                replica.metrics.add_metrics_point(dict(report_load(replica.engine.stats)), now_s)
                replica.metrics.prune_keys_and_compact_data(now_s - self._config.look_back_period_s)
                self._send(ReplicaMetricReport(replica.id, dict(replica.metrics.data), now_s))
        if now_s >= self._next_proxy_report_s:
            self._next_proxy_report_s = now_s + self._config.metrics_interval_s
            open_requests = {replica.id.to_full_id_str(): replica.engine.num_requests for replica in self._running()}
            if open_requests and len(self.requests) >= self._phantom_requests:
                open_requests[next(iter(open_requests))] += self._phantom_requests
            self._proxy_metrics.add_metrics_point({QUEUED_REQUESTS_KEY: len(self._queue), **open_requests}, now_s)
            self._report_proxy()
        while self._in_flight and self._in_flight[0][0] <= now_s:
            _, report = self._in_flight.popleft()
            if isinstance(report, ReplicaMetricReport):
                self._state.record_request_metrics_for_replica(report)
            else:
                self._state.record_request_metrics_for_handle(report)
        self._state.drop_stale_handle_metrics({"proxy"})

    def _report_proxy(self) -> None:
        now_s = self._clock.now_s
        self._proxy_metrics.prune_keys_and_compact_data(now_s - self._config.look_back_period_s)
        series = dict(self._proxy_metrics.data)
        queued = series.pop(QUEUED_REQUESTS_KEY, [])
        if not self._running():
            queued = [TimeStampedValue(now_s, len(self._queue))]
        source = DeploymentHandleSource.PROXY
        self._send(
            HandleMetricReport(DEPLOYMENT, "proxy", "proxy", source, queued, {RUNNING_REQUESTS_KEY: series}, now_s)
        )

    def _send(self, report: ReplicaMetricReport | HandleMetricReport) -> None:
        self._in_flight.append((self._clock.now_s + self._times.report_delay_s, report))

    def _scale(self, target: int, *, startup_s: float) -> None:
        """Start or stop replicas until there are as many as wanted; those still starting go first, then the newest."""
        now_s = self._clock.now_s
        kept = [replica for replica in self._replicas if replica.stopped_s is None]
        for _ in range(target - len(kept)):
            id = ReplicaID(f"r{self._num_started}", DEPLOYMENT)
            self._num_started += 1
            self._replicas.append(Replica(id, SimulatedEngine(self._speed), now_s + startup_s))
        for replica in sorted(kept, key=lambda replica: replica.ready_s)[target:]:
            replica.stopped_s = now_s
            self._state.on_replica_stopped(replica.id)
        if not self.scalings or target != self._target:
            self.scalings.append(Scaling(now_s, target))
            if target > self._target:
                self._state.record_scale_up()
            else:
                self._state.record_scale_down()
        self._target = target
