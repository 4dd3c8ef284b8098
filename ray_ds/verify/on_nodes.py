"""Asking every node at once, with patience that ends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.verify.context import ClusterNode
from ray_ds.verify.finding import Problem

T = TypeVar("T")
ASK_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers(Generic[T]):
    """What nodes said."""

    values: Mapping[ClusterNode, T]
    silent: Mapping[ClusterNode, str]
    """Why a node gave no answer."""

    def problems(self, what: str) -> list[Problem]:
        """Return the nodes that did not answer as problems; `what` names the question."""
        action = "see that the node is up (`ray status`) and that ray_ds and what it needs are installed there"
        return [
            Problem(wrong=f"node {node.name} did not say {what}: {reason}", action=action)
            for node, reason in self.silent.items()
        ]


def place_on(node: ClusterNode) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that keeps a task or an actor on a node."""
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)


def ask_nodes(
    nodes: Sequence[ClusterNode],
    function: Callable[..., T],
    arguments: Callable[[ClusterNode], tuple[Any, ...]] = lambda node: (),
    *,
    timeout_s: float = ASK_TIMEOUT_S,
    num_gpus: float = 0,
) -> Answers[T]:
    """Run a function on each node, beside whatever runs there, and return what each of them answers.

    Args:
        arguments: of the function, by node.
    """
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    asked = {node: task.options(scheduling_strategy=place_on(node)).remote(*arguments(node)) for node in nodes}
    return gather(asked, timeout_s=timeout_s)


def gather(asked: Mapping[ClusterNode, Any], *, timeout_s: float) -> Answers[Any]:
    """Return the answers to questions that are on their way; those that take too long are cancelled."""
    if not asked:
        return Answers(values={}, silent={})
    ready, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    values: dict[ClusterNode, Any] = {}
    silent: dict[ClusterNode, str] = {}
    for node, answer in asked.items():
        if answer not in ready:
            silent[node] = f"no answer within {timeout_s:g} s"
            continue
        try:
            values[node] = ray.get(answer)
        except RayError as error:
            silent[node] = headline(error)
    for answer in late:
        _cancel(answer)
    return Answers(values=values, silent=silent)


def _cancel(answer: Any) -> None:
    """Give up on a task; an actor's method ends with the actor."""
    try:
        ray.cancel(answer, force=True)
    except (ValueError, TypeError, RayError):
        return


def headline(error: BaseException) -> str:
    """Return an error in one line: its type and its last line that says something."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    lines = [line.strip() for line in str(shown).splitlines() if line.strip()]
    return f"{type(shown).__name__}: {lines[-1] if lines else 'no message'}"[:400]
