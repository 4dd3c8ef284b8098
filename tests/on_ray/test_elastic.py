"""The scaling policy without a cluster, and what it leans on in Ray; `test_elastic_runs.py` has real nodes."""

import inspect
import os
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
import ray
from ray._private.state import GlobalState
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, RayTrainWorker, Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_ds.on_ray import elastic
from ray_ds.on_ray.board import Board
from ray_ds.on_ray.elastic import GracefulElasticPolicy, Plan
from ray_ds.on_ray.sizing import Node, Sizes
from ray_ds.train.host import Request

CONTRACT: list[tuple[Callable[..., Any], str]] = [
    (DataParallelTrainer._initialize_and_run_controller, "self, **controller_init_kwargs"),
    (
        TrainController.__init__,
        "self, train_fn_ref, train_run_context, scaling_policy, failure_policy, callbacks, validation_config",
    ),
    (ScalingPolicy.__init__, "self, scaling_config"),
    (ElasticScalingPolicy.make_decision_for_non_running_worker_group, "self"),
    (
        ElasticScalingPolicy.make_decision_for_running_worker_group,
        "self, worker_group_state, worker_group_status",
    ),
    (ElasticScalingPolicy._get_resize_decision, "self, num_workers"),
    (ElasticScalingPolicy._maybe_send_resource_request, "self"),
    (ElasticScalingPolicy._send_resource_request, "self"),
    (ElasticScalingPolicy.on_controller_start_worker_group, "self, *, scaling_config, num_workers"),
    (DefaultFailurePolicy.__init__, "self, failure_config"),
    (DefaultFailurePolicy.make_decision, "self, training_failed_error"),
    (WorkerGroup.create, "train_run_context, worker_group_context, callbacks"),
    (WorkerGroup._start, "self"),
    (WorkerGroup.has_started, "self"),
    (WorkerGroup.shutdown, "self"),
    (
        WorkerGroup._create_workers,
        "self, num_workers, placement_group, resources_per_worker, placement_group_bundle_indices, "
        "starting_world_rank, world_size, replica_group_size",
    ),
    (WorkerGroup._assign_worker_ranks, "workers, starting_world_rank, world_size, replica_group_size"),
    (WorkerGroup._get_worker_runtime_env, "custom_runtime_env"),
    (WorkerGroup.get_latest_poll_status, "self"),
    (WorkerGroup.get_workers, "self"),
    (RayTrainWorker.__init__, "self"),
    (RayTrainWorker.execute, "self, fn, *fn_args, **fn_kwargs"),
    (RayTrainWorker.get_metadata, "self"),
    (Worker.__init__, "self, actor, metadata, resources, distributed_context, log_file_path, "
     "placement_group_bundle_index"),
    (_TorchBackend.on_shutdown, "self, worker_group, backend_config"),
    (BackendSetupCallback.before_execution_group_shutdown, "self, execution_group"),
    (PlacementGroupHandle.placement_group.fget, "self"),
    (GlobalState.get_draining_nodes, "self"),
    (GlobalState.available_resources_per_node, "self"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), CONTRACT, ids=lambda value: getattr(value, "__qualname__", ""))
def test_contract_with_ray(function: Callable[..., Any], expected: str) -> None:
    given = ", ".join(
        {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + name
        for name, parameter in inspect.signature(function).parameters.items()
    )
    wanted = expected.replace("*, ", "")
    message = f"ray {ray.__version__} has {function.__qualname__}({given}), not ({wanted}): use scaling = 'stock', or "
    assert given == wanted, message + "mend ray_ds/on_ray/{elastic,failures,spares,nodes}.py"


def test_contract_of_names_and_fields() -> None:
    message = f"ray {ray.__version__} differs from what ray_ds/on_ray/{{elastic,failures,spares}}.py lean on"
    assert TrainController.worker_group_cls is WorkerGroup and WorkerGroup._worker_cls is RayTrainWorker, message
    assert TorchConfig().backend_cls is _TorchBackend, message
    assert issubclass(TorchTrainer, DataParallelTrainer), message
    assert {"workers", "start_time", "placement_group_handle"} <= set(WorkerGroupState.__dataclass_fields__), message
    assert {"node_id", "pid", "accelerator_ids"} <= set(ActorMetadata.__dataclass_fields__), message
    assert list(ResizeDecision.__dataclass_fields__) == ["num_workers", "resources_per_worker"], message
    controller = inspect.getsource(TrainController)
    assert "self.worker_group_cls.create(" in controller and "on_controller_start_worker_group(" in controller, message
    for name in elastic.CONTROLLER_ENV:
        assert name in inspect.getsource(ray.train.v2._internal.constants) or name.startswith("RAY_WARN"), message


class Cluster:
    """Nodes of one CPU each, a clock, and a policy that sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_nodes: int, **plan: Any) -> None:
        self.now = 1000.0
        self.nodes = [f"node{number}" for number in range(num_nodes)]
        self.busy: set[str] = set()
        self.draining: set[str] = set()
        self.board = Board()
        self.group: Any = None
        sizes = Sizes(min_workers=1, max_workers=4, allowed=plan.pop("allowed", None))
        options = {"grow_pause_s": 30.0, "pause_timeout_s": 600.0, "max_failures": 1, **plan}
        handle = _Handle(self.board)
        config = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
        self.policy = GracefulElasticPolicy(config, Plan(sizes=sizes, **options), handle)
        self.policy.spares = SimpleNamespace(keep=lambda _: None, are_warm=lambda _: True)
        monkeypatch.setattr(self.policy, "_call", lambda answer: answer)
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(elastic, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(elastic, "usable_nodes", self._usable)
        monkeypatch.setattr(elastic, "answering", lambda nodes: list(nodes))
        monkeypatch.setattr(elastic, "reserved", lambda group: group or Counter())
        monkeypatch.setattr(elastic.time, "monotonic", lambda: self.now)

    def _usable(self, need: Any, held: Counter[str], most: int, *, probe: bool = True) -> list[Node]:
        return [
            Node(node_id=name, address=("", 0), total=1, free=held[name] if name in self.busy else 1)
            for name in self.nodes
            if name not in self.draining
        ]

    def start(self) -> int:
        """Let the policy start a group; return its size, 0 for none."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return self._execute(decision)

    def ask(self, after_s: float = 0.5) -> int:
        """Ask the policy about the running group some time later; return the new size, 0 for no change."""
        self.now += after_s
        decision = self.policy.make_decision_for_running_worker_group(self.group, None)
        return self._execute(decision)

    def _execute(self, decision: Any) -> int:
        if isinstance(decision, NoopDecision):
            return 0
        self.policy.on_controller_start_worker_group(scaling_config=None, num_workers=decision.num_workers)
        for rank in range(decision.num_workers):
            self.board.join(rank, decision.num_workers, "node")
        staying = [name for name in self.nodes if name not in self.draining][: decision.num_workers]
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in staying]
        handle = SimpleNamespace(placement_group=Counter(staying))
        self.group = SimpleNamespace(workers=workers, start_time=self.now, placement_group_handle=handle)
        return int(decision.num_workers)

    def say_safe(self) -> None:
        for rank in range(self.board.num_workers):
            self.board.safe(self.board.attempt, rank, 7, self.board.request)


class _Handle:
    """Calls the board as an actor's handle would, at once."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))


def test_room_that_ray_has_moved_to_another_node_for_the_lost_group_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2, allowed=(1,))
    assert cluster.start() == 1
    assert cluster.ask() == 0
    lost = cluster.group.workers[0].metadata.node_id
    (other,) = (name for name in cluster.nodes if name != lost)
    cluster.nodes.remove(lost)
    cluster.busy = {other}
    cluster.group.placement_group_handle.placement_group.update({other: 1, lost: -1})
    assert cluster.start() == 1


def test_starts_with_what_fits_and_waits_a_little_for_what_is_still_held(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 3)
    cluster.busy = {"node2"}
    assert cluster.start() == 0
    cluster.now += elastic.FREE_WAIT_S
    assert cluster.start() == 2


def test_waits_where_the_least_number_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 0)
    cluster.now += 100
    assert cluster.start() == 0


def test_grows_only_after_the_rest_and_once_all_workers_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1)
    assert cluster.start() == 1
    cluster.nodes.append("new")
    for _ in range(10):
        assert cluster.ask(2.0) == 0 and cluster.board.request is Request.NONE, "it grew before its rest was over"
    assert cluster.ask(20.0) == 0 and cluster.board.request is Request.PAUSE
    assert cluster.ask() == 0, "it did not wait for the workers"
    cluster.say_safe()
    assert cluster.ask() == 2 and cluster.board.request is Request.NONE


def test_a_node_that_comes_and_goes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1, grow_pause_s=0.0)
    assert cluster.start() == 1
    for _ in range(20):
        cluster.nodes.append("passing")
        assert [cluster.ask() for _ in range(3)] == [0, 0, 0]
        cluster.nodes.remove("passing")
        assert cluster.ask() == 0
    assert cluster.board.request is Request.NONE


def test_takes_sizes_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 3, allowed=(1, 2, 4), grow_pause_s=0.0)
    assert cluster.start() == 2
    assert [cluster.ask(5.0) for _ in range(5)] == [0] * 5 and cluster.board.request is Request.NONE
    cluster.nodes.append("fourth")
    cluster.ask(5.0)
    cluster.ask(5.0)
    cluster.say_safe()
    assert cluster.ask() == 4


def test_never_shrinks_because_a_node_is_gone_from_view(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 3)
    assert cluster.start() == 3
    cluster.nodes = cluster.nodes[:1]
    assert [cluster.ask(60.0) for _ in range(5)] == [0] * 5
    assert cluster.board.request is Request.NONE


def test_leaves_a_draining_node_at_once_and_only_with_a_safe_state(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 3)
    assert cluster.start() == 3
    cluster.draining = {"node1"}
    assert cluster.ask() == 0 and cluster.board.request is Request.PAUSE
    cluster.say_safe()
    assert cluster.ask() == 2


def test_a_whole_group_goes_where_one_of_its_nodes_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 4, allowed=(2, 4))
    assert cluster.start() == 4
    cluster.draining = {"node1"}
    assert cluster.ask() == 0 and cluster.board.request is Request.PAUSE
    cluster.say_safe()
    assert cluster.ask() == 2


def test_a_draining_node_without_workers_of_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1, grow_pause_s=0.0)
    assert cluster.start() == 1
    cluster.nodes.append("leaving")
    cluster.draining = {"leaving"}
    assert [cluster.ask(5.0) for _ in range(3)] == [0, 0, 0] and cluster.board.request is Request.NONE


@pytest.mark.parametrize(
    ("num_nodes", "allowed", "draining"),
    [
        pytest.param(1, None, {"node0"}, id="all workers are on the node"),
        pytest.param(4, None, {"node1", "node2"}, id="two nodes that may hold the same parts"),
        pytest.param(2, (2,), {"node1"}, id="too little is left to go on"),
    ],
)
def test_state_goes_to_storage_where_the_nodes_that_hold_it_may_all_go(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, allowed: tuple[int, ...] | None, draining: set[str]
) -> None:
    cluster = Cluster(monkeypatch, num_nodes, allowed=allowed)
    assert cluster.start() == num_nodes
    cluster.draining = draining
    assert cluster.ask() == 0 and cluster.board.request is Request.LEAVE


def test_state_in_memory_goes_to_storage_when_a_second_node_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2)
    assert cluster.start() == 2
    cluster.draining = {"node1"}
    assert cluster.ask() == 0 and cluster.board.request is Request.PAUSE
    cluster.say_safe()
    cluster.draining = {"node0", "node1"}
    assert cluster.ask() == 0 and cluster.board.request is Request.LEAVE
    cluster.nodes.append("new")
    assert cluster.ask() == 0, "it did not wait until the state was on storage"
    cluster.say_safe()
    assert cluster.ask() == 1


def test_stays_paused_where_too_little_is_left_until_nodes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2, allowed=(2,))
    assert cluster.start() == 2
    cluster.draining = {"node1"}
    cluster.ask()
    cluster.say_safe()
    assert [cluster.ask(60.0) for _ in range(5)] == [0] * 5
    cluster.nodes.append("new")
    assert cluster.ask() == 2


def test_gives_up_a_pause_that_nobody_keeps_and_tries_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1, pause_timeout_s=50.0)
    assert cluster.start() == 1
    cluster.nodes.append("new")
    cluster.ask(5.0)
    cluster.ask(30.0)
    assert cluster.board.request is Request.PAUSE
    for _ in range(60):
        cluster.ask(1.0)
    assert [event.kind for event in cluster.board.collect(0).events].count("pause_withdrawn") == 1
    cluster.ask(40.0)
    assert cluster.board.request is Request.PAUSE


def test_a_node_that_does_not_answer_is_not_grown_onto(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1, grow_pause_s=0.0)
    assert cluster.start() == 1
    monkeypatch.setattr(elastic, "answering", lambda nodes: [node for node in nodes if node.node_id != "silent"])
    cluster.nodes.append("silent")
    assert [cluster.ask(5.0) for _ in range(5)] == [0] * 5 and cluster.board.request is Request.NONE


def test_changes_nothing_while_ray_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise ray.exceptions.GetTimeoutError("Get timed out")

    cluster = Cluster(monkeypatch, 1, grow_pause_s=0.0)
    assert cluster.start() == 1
    with monkeypatch.context() as silence:
        silence.setattr(elastic, "draining_nodes", silent)
        assert [cluster.ask() for _ in range(3)] == [0, 0, 0]
        silence.setattr(elastic, "usable_nodes", silent)
        assert cluster.start() == 0
    assert cluster.start() == 1


@pytest.mark.parametrize("room", [0, 1], ids=["room gone", "room still there"])
def test_workers_that_agreed_on_a_pause_which_was_withdrawn_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    cluster = Cluster(monkeypatch, 1, pause_timeout_s=50.0)
    assert cluster.start() == 1
    cluster.nodes.append("new")
    cluster.ask(40.0)
    cluster.ask(5.0)
    assert cluster.board.request is Request.PAUSE
    cluster.ask(60.0)
    assert cluster.board.request is Request.NONE, "it was not withdrawn"
    cluster.nodes = cluster.nodes[: 1 + room]
    cluster.board.safe(cluster.board.attempt, 0, 7, Request.PAUSE)
    assert cluster.ask() == 1 + room
