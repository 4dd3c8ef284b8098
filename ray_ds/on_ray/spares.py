"""Warm processes for the next group of workers: where a node is lost, the start of processes is what takes the time.

A spare is one of Ray Train's worker actors that has imported all it needs and holds no resources. A new group takes the
spare of each node it is placed on, while its placement group reserves the resources. Spares are for CPU workers only:
Ray shows a GPU to a process when it starts.
"""

import importlib
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

LOW_PRIORITY = 5
"""A third of the share of a process as usual, so that training goes on and a busy node still gets its spares."""

START_TIMEOUT_S = 120.0
"""Time that a worker has to start, or a spare to get warm; longer than a cold start on a busy node takes."""

logger = logging.getLogger("ray.train")


class Spares:
    """The spares of a run, by node. It lives in Ray Train's controller, so they end with it."""

    def __init__(self, runtime_env: Mapping[str, Any], modules: Sequence[str]) -> None:
        self._runtime_env = dict(runtime_env)
        self._modules = tuple(modules)
        self._by_node: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        """Actors, with the answer that tells that one is warm."""

    @cached_property
    def actor_class(self) -> Any:
        """Return the class of actors that work and of those that wait to."""
        return ray.remote(runtime_env=self._runtime_env)(WorkerGroup._worker_cls)

    def keep(self, wanted: Mapping[str, int]) -> None:
        """Start what is missing of the spares wanted on each node, and end those on other nodes."""
        for node_id in self._by_node.keys() - wanted.keys():
            for actor, _ in self._by_node.pop(node_id):
                ray.kill(actor)
        for node_id, count in wanted.items():
            place = NodeAffinitySchedulingStrategy(node_id, soft=False)
            while self._modules and len(self._by_node[node_id]) < count:
                actor = self.actor_class.options(num_cpus=0, scheduling_strategy=place).remote()
                self._by_node[node_id].append((actor, actor.execute.remote(warm_up, self._modules)))

    def are_warm(self, wanted: Mapping[str, int]) -> bool:
        """Tell whether as many spares as wanted on each node have imported all."""
        for node_id, count in wanted.items() if self._modules else ():
            answers = [answer for _, answer in self._by_node[node_id]]
            ready, _ = ray.wait(answers, num_returns=len(answers), timeout=0) if answers else ([], [])
            if len(ready) < count:
                return False
        return True

    def take(self, node_id: str) -> tuple[Any, Any] | None:
        """Return a living spare of a node, which is no spare any more, with its metadata; None where there is none.

        One that does not answer in `START_TIMEOUT_S` is ended.
        """
        while self._by_node[node_id]:
            actor, _ = self._by_node[node_id].pop(0)
            try:
                return actor, ray.get(actor.get_metadata.remote(), timeout=START_TIMEOUT_S)
            except RayActorError:
                logger.info("a spare worker had died")
            except GetTimeoutError:
                logger.warning("a spare worker did not answer in %g s", START_TIMEOUT_S)
                ray.kill(actor)
        return None


def warm_up(modules: Sequence[str]) -> None:
    """Import what a worker needs, in a thread of low priority, so that training beside it goes on."""

    def import_all() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)  # on Linux, of this thread alone
        for module in modules:
            importlib.import_module(module)

    thread = threading.Thread(target=import_all, daemon=True, name="warm_up")
    thread.start()
    thread.join()


class SparedWorkerGroup(WorkerGroup):  # type: ignore[misc, unused-ignore]
    """A worker group that takes spares where there are some."""

    spares: Spares

    def _create_workers(
        self,
        num_workers: int,
        placement_group: Any,
        resources_per_worker: dict[str, float],
        *args: Any,
        **options: Any,
    ) -> list[Any]:
        nodes: Mapping[int, str] = placement_group_table(placement_group)["bundles_to_node_id"]
        actors: dict[int, Any] = {}
        answers: dict[int, Any] = {}
        for index in range(num_workers):
            spare = self.spares.take(nodes[index])
            actors[index] = spare[0] if spare else self._start_cold(index, placement_group, resources_per_worker)
            answers[index] = ray.put(spare[1]) if spare else actors[index].get_metadata.remote()
        try:
            metadata = ray.get([answers[index] for index in range(num_workers)], timeout=START_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            for actor in actors.values():
                ray.kill(actor)
            reason = "died while it started"
            if isinstance(error, GetTimeoutError):
                reason = f"did not start in {START_TIMEOUT_S:g} s"
            raise WorkerGroupStartupFailedError(f"a worker {reason}") from error
        workers = [
            Worker(actors[index], metadata[index], resources_per_worker, placement_group_bundle_index=index)
            for index in range(num_workers)
        ]
        return list(WorkerGroup._assign_worker_ranks(workers))

    def _start_cold(self, index: int, group: Any, resources: Mapping[str, float]) -> Any:
        """Start a worker in a bundle of the placement group."""
        place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        return self.spares.actor_class.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=others,
            scheduling_strategy=place,
        ).remote()


class SparedController(TrainController):  # type: ignore[misc, unused-ignore]
    """Ray Train's controller, whose groups take spares and whose policy keeps them."""

    def __init__(self, *, modules: Sequence[str], **options: Any) -> None:
        runtime_env = options["train_run_context"].run_config.worker_runtime_env
        self._spares = Spares(WorkerGroup._get_worker_runtime_env(custom_runtime_env=runtime_env), modules)
        options["scaling_policy"].spares = self._spares
        super().__init__(**options)

    @property
    def worker_group_cls(self) -> Any:
        """Return what the controller calls `create` of."""
        return self

    def create(self, **options: Any) -> SparedWorkerGroup:
        """Return a group that has started.

        Ray 2.60 lets go of a group that fails in the last part of its start with its workers and its room still held.
        """
        group = SparedWorkerGroup(**options)
        group.spares = self._spares
        try:
            group._start()
        except Exception:
            if group.has_started():
                group.shutdown()
            raise
        return group
