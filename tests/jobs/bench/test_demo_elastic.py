"""`make demo-elastic`: what it makes of a run's records, what it does to nodes, and how it leaves them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.bench import demo_elastic
from jobs.bench.demo_elastic import DISTURBANCES, NODE, bring_back, count_steps, describe, run_disturbed, show

STEPS = 120


def records(*, restarted_at: int | None = None) -> list[dict[str, float]]:
    """Return a record a second; after a restart there is one worker, and ten seconds were lost."""
    made = []
    for step in range(1, STEPS + 1):
        is_after = restarted_at is not None and step > restarted_at
        made.append(
            {
                "step": step,
                "loss": 5.0 - step / 100,
                "time": float(step + 10 * is_after),
                "seconds": 1.0,
                "world_size": 1 if is_after else 2,
                "restarts": int(is_after),
                "goodput": 0.9,
                "lost_s": 10.0 * is_after,
            }
        )
    return made


def note(step: int, **changes: Any) -> dict[str, Any]:
    return {"what": "worker-1 is killed", "step": step, "time": step + 0.5, "steps_again": 2, **changes}


def test_a_disturbance_is_told_by_the_restart_that_followed() -> None:
    row = describe(note(30), records(restarted_at=30))
    assert row == ("worker-1 is killed", "30", "2 -> 1", "2", "10.0")


def test_a_disturbance_that_training_did_not_feel_is_told_as_such() -> None:
    assert describe(note(30), records())[2:] == ("as before", "0", "0.0")
    assert describe(note(45), records(restarted_at=30))[2:] == ("as before", "0", "0.0"), "the restart was before it"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A recipe whose elastic step lies in `digest/`."""
    step = SimpleNamespace(settings=SimpleNamespace(num_steps=STEPS))
    monkeypatch.setattr(demo_elastic, "step_uri", lambda recipe, step: str(tmp_path / "digest"))
    monkeypatch.setattr(demo_elastic, "POLL_S", 0.0)
    return SimpleNamespace(run_dir=str(tmp_path), step=lambda name: step)


def test_both_curves_are_drawn_and_the_last_line_has_the_figures(
    recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elastic = records(restarted_at=30)
    elastic[50]["loss"] *= 1 + 1e-6
    curves = {"quiet": records(), "elastic": elastic}
    monkeypatch.setattr(demo_elastic, "read_records", lambda recipe, name: curves[name])
    show(recipe, [note(30)])
    assert (Path(recipe.run_dir) / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    lines = capsys.readouterr().out.splitlines()
    assert any("worker-1 is killed" in line and "2 -> 1" in line for line in lines)
    figures = json.loads(lines[-1])["figures"]
    assert figures["largest_relative_loss_difference"] == pytest.approx(1e-6, rel=1e-3)
    assert (figures["restarts"], figures["steps_again"], figures["lost_s"]) == (1, 2, 10.0)


def test_without_notes_the_curves_are_compared_and_that_is_said(
    recipe: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo_elastic.read_notes(recipe) == []
    assert capsys.readouterr().out.startswith("nothing is known of disturbances: there is no ")
    demo_elastic.notes_file(recipe).write_text(json.dumps([note(30)]))
    assert demo_elastic.read_notes(recipe) == [note(30)]


def test_steps_are_those_of_the_live_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_elastic, "POLL_S", 0.0)
    live = tmp_path / "metrics.jsonl"
    assert count_steps(live, 7) == 7, "it is gone once the run is finished"
    live.write_text("{}\n" * 5)
    assert count_steps(live, 3) == 5
    assert count_steps(live, 9) == 5, "the run went back"


def test_nodes_are_disturbed_as_the_run_goes_and_what_runs_again_is_counted(
    recipe: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "digest/work/metrics.jsonl"
    live.parent.mkdir(parents=True)
    course = iter([0, 29, 30, 40, 62, 95, 80, 110])

    class Job:
        returncode = 75

        def poll(self) -> int | None:
            done = next(course, None)
            live.write_text("{}\n" * (done or 0))
            return 75 if done is None else None

    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo_elastic.subprocess, "Popen", lambda words: Job())
    monkeypatch.setattr(demo_elastic.subprocess, "run", lambda words, check: called.append(tuple(words)))
    notes: list[dict[str, Any]] = []
    assert run_disturbed(recipe, notes) == 75
    assert [(entry["step"], entry["steps_again"]) for entry in notes] == [(30, 0), (62, 0), (95, 15)]
    assert called == [disturbance.command for disturbance in DISTURBANCES]


@pytest.mark.parametrize(
    ("num_happened", "expected"),
    [
        (0, []),
        (1, [("start", "worker-1")]),
        (3, [("start", "worker-1"), ("start", "worker-2"), ("kill", "worker-3")]),
    ],
)
def test_the_cluster_has_the_nodes_again_that_it_had(
    num_happened: int, expected: Sequence[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [{"worker-2": "up"}, {"worker-2": "changing"}, {}]  # it drains for a while
    after = {"head": "up", "worker-1": "up", "worker-2": "up"}
    for disturbance in DISTURBANCES[:num_happened]:
        after |= {disturbance.ends: "down"} if disturbance.ends else {"worker-3": "up"}

    def node_states() -> dict[str, str]:
        return {**after, **(looks.pop(0) if num_happened == 3 and looks else {})}

    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo_elastic, "POLL_S", 0.0)
    monkeypatch.setattr(demo_elastic, "node_states", node_states)
    monkeypatch.setattr(demo_elastic.subprocess, "run", lambda words, check: called.append(tuple(words)))
    bring_back({"head", "worker-1", "worker-2"}, DISTURBANCES[:num_happened])
    assert called == [(NODE, *words) for words in expected]
