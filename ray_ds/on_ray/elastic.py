"""Elastic training on Ray Train's hooks: how many workers, and when they change.

What leans on private parts of Ray Train (2.60) is here, in `failures.py` and in `spares.py`, which `scaling = "stock"`
goes without; the contract is in `tests/on_ray/test_elastic.py`. Private parts of Ray's core are in `nodes.py`,
`run_lock.py` and `autoscaler.py`, which both ways need. What Ray Train's own policy does not do: it restarts workers
without a word, so that the work since the last checkpoint is lost; it counts nodes that drain or just died; it looks
for new nodes every 20 s and waits a minute for a dead one.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.on_ray import NO_AUTO_CONNECT
from ray_ds.on_ray.board import Look
from ray_ds.on_ray.failures import BoundedFailurePolicy, is_lost_group
from ray_ds.on_ray.nodes import answering, draining_nodes, reserved, usable_nodes
from ray_ds.on_ray.outcome import LostTooOften, StoppedWithoutWorkers, headline
from ray_ds.on_ray.sizing import Node, Offer, Sizes, joining, room
from ray_ds.on_ray.spares import SparedController, Spares
from ray_ds.train.host import Request

NODE_LABEL = "ray.io/node-id"
CONTROLLER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would wait for the node's end before it restarts anything
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""What Ray Train's controller reads, if the driver's environment does not say otherwise."""
SETTLE_S = 2.0
"""Time that more room must last before workers are added."""
FREE_WAIT_S = 3.0
"""Time to wait, before workers start, for resources that the cluster has and something else still holds."""
SPARE_WAIT_S = 20.0
"""Time that a larger size waits, at most, for warm processes on the new nodes; training goes on meanwhile."""
SPARE_DELAY_S = 5.0
"""Time that a new group has for itself before its spares start."""
CALL_TIMEOUT_S = 30.0
RESOURCE_REQUEST_S = 20.0
"""As often as Ray Train's own policies; a request holds for three minutes."""

logger = logging.getLogger("ray.train")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the policies go by."""

    sizes: Sizes
    grow_pause_s: float
    pause_timeout_s: float
    """Time that workers have to come to a pause before it is called off."""
    max_failures: int
    spare_modules: tuple[str, ...] = ()
    """What spare workers import; none are kept where this is empty."""


class ElasticTorchTrainer(TorchTrainer):  # type: ignore[misc, unused-ignore]
    """A `TorchTrainer` whose workers are scaled and replaced by this file's policies."""

    def __init__(self, *args: Any, plan: Plan, board: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._plan = plan
        self._board = board

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = GracefulElasticPolicy(self.scaling_config, self._plan, self._board)
        options["failure_policy"] = BoundedFailurePolicy(self._plan.max_failures, self._board)
        options["callbacks"] = [*options["callbacks"], _EndUnfinishedAtOnce()]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        env = {**CONTROLLER_ENV, **NO_AUTO_CONNECT, **get_env_vars_to_propagate()}
        actor = ray.remote(num_cpus=0, runtime_env={"env_vars": env}, scheduling_strategy=here)(SparedController)
        controller = actor.remote(**options, modules=self._plan.spare_modules)
        ray.get(controller.run.remote())
        result = ray.get(controller.get_result.remote())
        if is_lost_group(result.error):
            raise LostTooOften(result.error)
        return result


class GracefulElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc, unused-ignore]
    """Grows when nodes have joined and leaves those that drain, both only once the workers' state is safe.

    It shrinks for no other reason; lost workers are the failure policy's. It runs in Ray Train's controller, which
    asks it twice a second.
    """

    def __init__(self, scaling_config: Any, plan: Plan, board: Any) -> None:
        super().__init__(scaling_config)
        self._plan = plan
        self._board = board
        self.spares: Spares
        self._need: dict[str, float] = scaling_config._resources_per_worker_not_none
        self._offer = Offer()
        self._held: Counter[str] = Counter()
        """Workers by node."""
        self._placement: Any = None
        """The placement group of the last workers; it keeps its room until the next ones start."""
        self._joining: Counter[str] = Counter()
        """Workers that will be added, by node, once more room has lasted."""
        self._chosen: list[str] = []
        """Nodes that the next group is placed on."""
        self._asking: threading.Thread | None = None
        self._asked_for_resources_at = float("-inf")
        self._asked_at: float | None = None
        self._next_growth_at = 0.0
        self._waiting_since: float | None = None
        self._said_waiting = False

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start as many workers as living nodes hold, as soon as the least number fits."""
        self._maybe_send_resource_request()
        try:
            return self._decide_to_start()
        except RayError as error:
            return self._decide_later(error)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Ask for a pause when the group should change, and change it when its state is safe."""
        self._maybe_send_resource_request()
        try:
            return self._decide_to_change(worker_group_state)
        except RayError as error:
            return self._decide_later(error)

    def _decide_later(self, error: RayError) -> Any:
        """Leave all as it is while Ray's head or the board does not answer; Ray Train would end the run."""
        logger.warning("no scaling decision: %s", headline(error))
        return NoopDecision()

    def _decide_to_start(self) -> Any:
        if self._look().request is Request.STOP:
            raise StoppedWithoutWorkers("told to stop while no workers ran")
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        nodes = usable_nodes(self._need, reserved(self._placement), self._plan.sizes.max_workers)
        size = self._plan.sizes.largest(room(nodes))
        possible = self._plan.sizes.largest(sum(node.total for node in nodes))
        if size == 0 or (size < possible and now - self._waiting_since < FREE_WAIT_S):
            if not self._said_waiting and now - self._waiting_since > FREE_WAIT_S:
                self._said_waiting = True
                facts = {"room": room(nodes), "least": self._plan.sizes.min_workers}
                self._board.note.remote("waiting_for_nodes", facts)
            return NoopDecision()
        return self._resize(size, nodes)

    def _decide_to_change(self, worker_group_state: Any) -> Any:
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self._placement = worker_group_state.placement_group_handle.placement_group
        look = self._look()
        if look.request is Request.STOP:
            return NoopDecision()
        now = time.monotonic()
        if self._asked_at is None and now > worker_group_state.start_time + SPARE_DELAY_S:
            self.spares.keep(self._held + self._joining)
        request, reason = self._wanted(worker_group_state, now)
        if request > look.request:
            self._call(self._board.ask.remote(request, reason))
            self._asked_at = now
        elif look.is_safe:  # also after a pause was withdrawn that the workers had agreed on: they wait for it
            nodes = usable_nodes(self._need, self._held, self._plan.sizes.max_workers)
            size = self._plan.sizes.largest(room(nodes))
            return self._resize(size, nodes) if size else NoopDecision()
        elif self._asked_at is None:
            return NoopDecision()
        elif not look.any_safe and now - self._asked_at > self._plan.pause_timeout_s:
            self._call(self._board.withdraw.remote("the workers did not pause in time"))
            self._rest(now)
        elif look.request is Request.NONE:  # the workers declined
            self._rest(now)
        return NoopDecision()

    def _rest(self, now: float) -> None:
        """Wait before the group is asked again to pause for growth."""
        self._asked_at = None
        self._next_growth_at = now + self._plan.grow_pause_s

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """Note the new group on the board, and keep it to the nodes that were found alive and staying."""
        self._call(self._board.begin.remote(num_workers))
        self._held, self._joining = Counter(), Counter()
        return {NODE_LABEL: f"in({','.join(self._chosen)})"} if self._chosen else None

    def _wanted(self, group: Any, now: float) -> tuple[Request, str]:
        """Return what to ask of the group, and why.

        Memory keeps the state where one of several nodes goes and training goes on at once: each part lies on two.
        """
        leaving = self._held.keys() & draining_nodes()
        if not leaving:
            growth = self._reason_to_grow(group, now) if self._asked_at is None else None
            return (Request.PAUSE, growth) if growth else (Request.NONE, "")
        reason = f"nodes drain: {', '.join(sorted(node[:8] for node in leaving))}"
        staying = usable_nodes(self._need, self._held, self._plan.sizes.max_workers, probe=False)
        goes_on = self._plan.sizes.largest(room(staying)) > 0
        return Request.PAUSE if len(leaving) == 1 < len(self._held) and goes_on else Request.LEAVE, reason

    def _reason_to_grow(self, group: Any, now: float) -> str | None:
        """Return why the group should grow, if it should."""
        size = sum(self._held.values())
        nodes = usable_nodes(self._need, self._held, self._plan.sizes.max_workers, probe=False)
        offered = self._plan.sizes.largest(room(nodes))
        stands_s = self._offer.stands(offered if offered > size else 0, now)
        self._joining = Counter(joining(nodes, self._held, offered) if offered > size else {})
        resting = now < max(group.start_time + self._plan.grow_pause_s, self._next_growth_at)
        warming = stands_s < SPARE_WAIT_S and not self.spares.are_warm(self._joining)
        if stands_s < SETTLE_S or resting or warming:
            return None
        reached = self._plan.sizes.largest(room(answering(nodes)))
        return f"room for {reached} workers, {size} run" if reached > size else None

    def _resize(self, size: int, nodes: Sequence[Node]) -> Any:
        """Return the decision to run `size` workers on these nodes."""
        self._chosen = [node.node_id for node in nodes if node.free]
        self._asked_at = self._waiting_since = None
        self._said_waiting = False
        self._offer.stands(0, 0.0)
        running = sum(self._held.values())
        self._board.note.remote("resizing", {"from": running, "to": size})
        return self._get_resize_decision(size)

    def _send_resource_request(self) -> None:
        """Tell the autoscaler what is wanted, in a thread: the actor that passes it on may be lost with its node."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=super()._send_resource_request, daemon=True)
            self._asking.start()

    def _maybe_send_resource_request(self) -> None:
        if time.monotonic() > self._asked_for_resources_at + RESOURCE_REQUEST_S:
            self._asked_for_resources_at = time.monotonic()
            self._send_resource_request()

    def _look(self) -> Look:
        look: Look = self._call(self._board.look.remote())
        return look

    def _call(self, answer: Any) -> Any:
        return ray.get(answer, timeout=CALL_TIMEOUT_S)


class _EndUnfinishedAtOnce(WorkerGroupCallback):  # type: ignore[misc, unused-ignore]
    """Kills workers that have not finished instead of asking them to end, for which Ray waits where one is dead.

    They are safe, lost or hung; a killed process leaves nothing that its successor needs.
    """

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Kill the workers."""
        status = worker_group.get_latest_poll_status()
        if status is None or not status.finished or status.errors:
            for worker in worker_group.get_workers():
                ray.kill(worker.actor)


class _KeptGroupBackend(_TorchBackend):  # type: ignore[misc, unused-ignore]
    """Leaves the process group to the end of its processes; taking it down waits for lost ones, up to 30 s."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Do nothing."""


@dataclass
class KeptGroupTorchConfig(TorchConfig):  # type: ignore[misc, unused-ignore]
    """A `TorchConfig` with that backend."""

    @property
    def backend_cls(self) -> type[_KeptGroupBackend]:
        """Return the backend's class."""
        return _KeptGroupBackend
