"""Runs that were disturbed are judged by their losses and by what happened when."""

from pathlib import Path
from typing import Any, cast

import pytest

from ray_ds.on_ray.board import Event
from ray_ds.verify import changes
from ray_ds.verify.changes import judge_join, judge_kill
from ray_ds.verify.tiny_training import STEPS, Trained, judge_losses, largest_difference
from ray_ds.verify.training import judge_resume

NOTE = {"time": 1000.0, "step": 10, "workers": 2}


def records(restart_at: int | None = None, gap_s: float = 0.0, grown_at: int = STEPS, shift: float = 0.0) -> list[Any]:
    """Return a run's records, a step a second up to the kill at 1000.0, then `gap_s` until the step that follows."""
    rows = []
    for step in range(1, STEPS + 1):
        is_after = restart_at is not None and step >= restart_at
        when = 1000.0 + gap_s + step - (restart_at or 0) if is_after else 989.0 + step
        size = 2 if step > grown_at else 1
        rows.append({"step": step, "loss": 5.0 + shift, "time": when, "restarts": int(is_after), "world_size": size})
    return rows


def trained(rows: list[Any], events: list[Event] | None = None, stopped_at: int | None = None) -> Trained:
    nothing = cast(Any, None)
    return Trained(run=nothing, settings=nothing, records=rows, events=events or [], stopped_at=stopped_at, seconds=9.0)


def test_a_run_that_went_on_is_right_and_measured() -> None:
    finding = judge_kill(NOTE, trained(records(restart_at=9, gap_s=7.5)), trained(records()))
    assert finding.outcome == "passed" and not finding.advice
    assert finding.figures["kill_to_step_s"] == pytest.approx(7.5) and finding.figures["steps_again"] == 2


def test_a_slow_restart_is_advice() -> None:
    finding = judge_kill(NOTE, trained(records(restart_at=9, gap_s=75.0)), trained(records()))
    assert finding.outcome == "passed" and "75 s from kill to next step" in finding.advice[0]


def test_a_run_that_did_not_go_on_is_wrong() -> None:
    finding = judge_kill(NOTE, trained(records()[:10]), trained(records()))
    assert [problem.wrong for problem in finding.problems] == [
        "the losses of a run whose worker was killed differ from those of an undisturbed run: steps are missing, more"
        " than 1e-05",
        "no step followed on the death of a worker after step 10",
    ]


def test_other_losses_after_the_kill_are_wrong() -> None:
    finding = judge_kill(NOTE, trained(records(restart_at=9, gap_s=7.5, shift=1e-3)), trained(records()))
    assert finding.outcome == "failed" and "by 0.0002 of their value" in finding.problems[0].wrong


def test_a_run_that_grew_is_right() -> None:
    finding = judge_join(trained(records(grown_at=7)), trained(records()), 4.5)
    assert finding.outcome == "passed" and finding.figures["steps_alone"] == 7 and finding.figures["steps_lost"] == 0
    assert finding.figures["join_to_used_s"] == 4.5


def test_a_run_that_did_not_grow_is_wrong() -> None:
    finding = judge_join(trained(records()), trained(records()), None)
    assert finding.outcome == "failed" and "did not grow though there was room" in finding.problems[0].wrong


def test_losses_that_are_no_numbers_are_not_equal() -> None:
    rows = records()
    rows[3] = {**rows[3], "loss": float("nan")}
    assert judge_losses({"a": largest_difference(records(), rows)}, "b")


def test_losses_within_rounding_are_equal() -> None:
    assert judge_losses({"a": largest_difference(records(), records(shift=1e-6))}, "b") == []


def stepping(step: int) -> Event:
    return Event(time=0.0, kind="stepping", facts={"step": step})


def test_a_resumed_run_must_go_on_behind_where_it_was_stopped() -> None:
    stopped = trained([], stopped_at=6)
    assert judge_resume(stopped, trained([], [stepping(7)])) == []
    (problem,) = judge_resume(stopped, trained([], [stepping(1)]))
    assert problem.wrong == "a run stopped after step 6 went on at step 1: its checkpoint was not found"
    (deaf,) = judge_resume(trained([]), trained([]))
    assert "went on to the end" in deaf.wrong


@pytest.mark.parametrize("check", [changes.check_kill, changes.check_join])
def test_without_room_they_do_not_apply(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.verify.test_runner import make_context

    monkeypatch.setattr(changes, "wait_for_room", lambda context, most: 0)
    finding = check(make_context(tmp_path))
    assert finding.outcome == "not applicable" and finding.reason
