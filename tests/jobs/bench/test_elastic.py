"""The elastic bench: what it makes of records, and that its command gives every figure that it promises."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from jobs.bench import elastic, elastic_nodes
from jobs.bench.elastic import Training, disturb_by_drain, disturb_by_join, disturb_by_kill, make_task

NOW = 100.0
Records = list[Mapping[str, float]]


def steps(first: int, last: int, *, workers: int, end: float) -> Records:
    """Return a record a step and second; the last step ends at `end`."""
    return [
        {"step": step, "world_size": workers, "time": end - (last - step), "restarts": 0}
        for step in range(first, last + 1)
    ]


class PlayedTraining(Training):
    """Has some records, and gets the others once it is waited for."""

    def __init__(self, before: Records, after: Records) -> None:
        self.records = list(before)
        self._after = after

    def wait_for_workers(self, count: int) -> None:
        """Give all records."""
        self.records += self._after
        assert self.records[-1]["world_size"] == count


class PlayedNodes:
    """Nodes that are only noted."""

    def __init__(self, *ids: str) -> None:
        self.ids = list(ids)
        self.drained: list[str] = []

    def alive(self) -> list[str]:
        return list(self.ids)

    def add(self) -> None:
        self.ids.append("new")

    def kill(self, node_id: str) -> None:
        self.ids.remove(node_id)

    def drain(self, node_id: str, deadline_s: int) -> None:
        self.drained.append(node_id)


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.time, "time", lambda: NOW)


def test_a_kill_costs_the_time_to_a_step_and_the_steps_that_run_again() -> None:
    nodes = PlayedNodes("a", "b")
    late = steps(11, 11, workers=2, end=NOW + 0.1)  # was under way when the node died
    training = PlayedTraining(steps(1, 10, workers=2, end=NOW - 1), [*late, *steps(9, 12, workers=1, end=NOW + 6)])
    assert disturb_by_kill(training, nodes) == {"kill_to_step_s": 3.0, "seconds_lost_kill": 6.0, "steps_lost_kill": 3}
    assert nodes.ids == ["a"]


@pytest.mark.parametrize(("first", "lost"), [(11, 0), (8, 3)])
def test_a_join_costs_the_time_from_the_nodes_registration(first: int, lost: int) -> None:
    after = steps(first, 20, workers=2, end=NOW + 4 + 20 - first)
    training = PlayedTraining(steps(1, 10, workers=1, end=NOW), after)
    found = disturb_by_join(training, PlayedNodes("a"))
    assert found == {"join_to_used_s": 4.0, "steps_lost_join": lost}


def test_a_drained_node_is_left_before_its_deadline() -> None:
    nodes = PlayedNodes("a", "b")
    training = PlayedTraining(steps(1, 10, workers=2, end=NOW), steps(11, 12, workers=1, end=NOW + 3))
    assert disturb_by_drain(training, nodes) == {"drain_to_step_s": 2.0, "steps_lost_drain": 0}
    assert nodes.drained == ["b"] and nodes.ids == ["a", "b"], "nobody kills it any more"


def test_both_sides_train_the_same_but_for_scaling_and_snapshots(tmp_path: Path) -> None:
    ours, stock = (make_task(tmp_path / side, side).settings for side in ("graceful", "stock"))
    assert (ours.scaling, stock.scaling) == ("graceful", "stock")
    assert (ours.snapshot_every, stock.snapshot_every) == ("auto", 0)
    for name in ("num_steps", "batch_tokens", "checkpoint_every", "num_workers", "model", "optimizer"):
        assert getattr(ours, name) == getattr(stock, name)


def test_what_ray_train_writes_lies_beside_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Mock()
    monkeypatch.setattr(elastic, "train_on_ray", played)
    elastic.Training(tmp_path, "stock").end()
    (work,) = {Path(call.kwargs["work"]) for call in played.call_args_list}
    assert work == Path(played.call_args.args[0].checkpoints).parent, "`train_on_ray` makes ray_train/ in it"


def test_a_node_counts_as_falsely_dead_once_and_every_daemon_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalled(PlayedNodes):
        def daemons(self) -> list[int]:
            if len(signals) == 4:
                self.kill("b")
            return [4_000_001, 4_000_002]

    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(elastic_nodes.os, "kill", lambda pid, signum: signals.append((pid, signum)))
    monkeypatch.setattr(elastic_nodes.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(elastic_nodes.time, "sleep", lambda seconds: None)
    clock = iter(range(100))
    monkeypatch.setattr(elastic_nodes.time, "monotonic", lambda: next(clock))
    burner = Mock()
    monkeypatch.setattr(elastic_nodes.subprocess, "Popen", lambda words: burner)
    assert elastic_nodes.count_false_deaths(Stalled("a", "b"), minutes=0.1, seed=0) == 1
    assert [signum for _, signum in signals] == [signal.SIGSTOP, signal.SIGCONT] * (len(signals) // 2)
    assert len(signals) >= 8 and all(stop[0] == go[0] for stop, go in zip(signals[::2], signals[1::2], strict=True))
    assert burner.method_calls == [call.kill(), call.wait()], "the CPU is given back"


FIGURES = {
    "kill_to_step_s",
    "seconds_lost_kill",
    "join_to_used_s",
    "steps_lost_join",
    "steps_lost_drain",
    "goodput",
    "false_deaths",
}


@pytest.mark.parametrize(
    ("words", "sides"), [([], ["graceful", "stock"]), (["--no-peers"], ["graceful"])], ids=["all", "ours"]
)
def test_the_plain_command_gives_every_figure(
    words: Sequence[str],
    sides: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[str] = []

    def measure(folder: Path, side: str, options: object) -> dict[str, float]:
        measured.append(side)
        names = ("kill_to_step_s", "seconds_lost_kill", "join_to_used_s", "steps_lost_join", "steps_lost_drain")
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr(sys, "argv", ["elastic", *words])
    monkeypatch.setattr(elastic, "write_synthetic_shards", lambda folder: None)
    monkeypatch.setattr(elastic, "measure", measure)
    monkeypatch.setattr(elastic, "measure_goodput", lambda folder, options: 0.97)
    monkeypatch.setattr(elastic, "measure_stalls", lambda folder, options: {"false_deaths": 0})
    elastic.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["name"] == "elastic" and set(found) == {"name", "inputs", "figures", "peers"}
    assert set(found["figures"]) == FIGURES and measured == sides
    assert set(found["peers"]) == (
        {f"stock_{name}" for name in FIGURES - {"goodput", "false_deaths"}} if len(sides) > 1 else set()
    )
    assert any(line.split() == ["goodput", "0.97"] for line in table)
