"""The account of a run's time, on made-up schedules."""

from pathlib import Path
from typing import Any

import pytest

from ray_ds.train.goodput import Attempt, Goodput, read_attempts, write_attempts


class Run:
    """A made-up run: a clock, the records so far, and what outlives its processes."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.records: list[dict[str, Any]] = []
        self.attempts: tuple[Attempt, ...] = ()
        self.job_started = 1000.0

    def start(self, *, kept: int = 0, last_sign: float | None = None) -> None:
        """Begin an attempt that goes on from the first `kept` records."""
        self.records = self.records[:kept]
        state: dict[str, Any] = {"now": self.clock, "job_started": self.job_started, "last_sign": last_sign}
        self.goodput = Goodput(self.records, self.attempts, world_size=2, device="cpu", **state)
        self.attempts = self.goodput.attempts

    def steps(self, count: int, seconds: float = 1.0, pause_s: float = 0.0, is_skipped: bool = False) -> None:
        """Run steps, each followed by a pause such as a checkpoint's."""
        for _ in range(count):
            self.clock += seconds
            figures = self.goodput.count(seconds, now=self.clock, is_skipped=is_skipped)
            self.records.append({"step": len(self.records) + 1, "seconds": seconds, **figures})
            self.clock += pause_s

    def shows(self, **expected: float) -> None:
        last = self.records[-1]
        assert {name: last[name] for name in expected} == pytest.approx(expected)


def test_an_undisturbed_run_loses_nothing() -> None:
    run = Run()
    run.clock += 30.0  # starting up is before the run's first step
    run.start()
    run.steps(10)
    run.shows(time=1040.0, elapsed_s=10.0, lost_s=0.0, goodput=1.0, restarts=0)


def test_pauses_for_checkpoints_are_neither_useful_nor_lost() -> None:
    run = Run()
    run.start()
    run.steps(5, pause_s=1.0)
    run.shows(elapsed_s=9.0, lost_s=0.0, goodput=5 / 9)


def test_a_kill_loses_the_steps_that_run_again_and_the_time_until_they_do() -> None:
    run = Run()
    run.start()
    run.steps(10)  # a checkpoint after step 6; killed after step 10
    run.clock += 8.0
    run.start(kept=6)
    run.steps(4)
    run.shows(elapsed_s=22.0, lost_s=12.0, goodput=10 / 22, restarts=1)


def test_two_kills_before_another_checkpoint_are_two_restarts() -> None:
    run = Run()
    run.start()
    run.steps(10)
    for _ in range(2):
        run.clock += 8.0
        run.start(kept=6)
        run.steps(1)
    run.shows(elapsed_s=6 + 4 + 8 + 1 + 8 + 1, lost_s=4 + 8 + 1 + 8, goodput=7 / 28, restarts=2)


def test_a_kill_before_the_first_checkpoint_loses_all_until_then() -> None:
    run = Run()
    run.start()
    run.steps(3)
    run.clock += 7.0
    run.start(kept=0)
    run.steps(10)
    run.shows(elapsed_s=20.0, lost_s=10.0, goodput=0.5, restarts=1)


def test_a_pause_for_another_number_of_workers_is_lost_but_no_step_is() -> None:
    run = Run()
    run.start()
    run.steps(10)
    run.clock += 5.0
    run.start(kept=10)
    run.steps(5)
    run.shows(elapsed_s=20.0, lost_s=5.0, goodput=15 / 20, restarts=1)


def test_an_hour_without_a_job_does_not_count_but_its_start_does() -> None:
    run = Run()
    run.start()
    run.steps(10)  # a checkpoint after step 6; the driver and its workers die after step 10
    last_sign = run.clock
    run.clock += 3600.0
    run.job_started = run.clock
    run.clock += 20.0
    run.start(kept=6, last_sign=last_sign)
    run.steps(4)
    run.shows(elapsed_s=6 + 4 + 20 + 4, lost_s=4 + 20, goodput=10 / 34, restarts=1)


def test_without_a_live_file_the_last_steps_of_a_lost_submission_are_unknown() -> None:
    run = Run()
    run.start()
    run.steps(10)
    run.clock += 3600.0
    run.job_started = run.clock
    run.clock += 20.0
    run.start(kept=6)
    run.steps(4)
    run.shows(elapsed_s=6 + 20 + 4, lost_s=20.0, goodput=10 / 30)


def test_two_hours_without_a_job_and_no_checkpoint_in_between() -> None:
    run = Run()
    run.start()
    run.steps(6)
    for _ in range(2):
        last_sign = run.clock
        run.clock += 3600.0
        run.job_started = run.clock
        run.clock += 10.0
        run.start(kept=6, last_sign=last_sign)
        run.steps(2)
    run.shows(elapsed_s=6 + 10 + 2 + 10 + 2, lost_s=10 + 2 + 10, goodput=8 / 30, restarts=2)


def test_what_the_first_step_after_a_restart_takes_longer_is_lost() -> None:
    run = Run()
    run.start()
    run.steps(5)
    run.start(kept=5)
    run.steps(1, seconds=15.0)
    run.shows(elapsed_s=20.0, lost_s=14.0, goodput=6 / 20)
    run.steps(1, seconds=15.0)  # a slow step later on is just slow
    run.shows(elapsed_s=35.0, lost_s=14.0, goodput=21 / 35)


def test_a_skipped_step_is_neither_useful_nor_lost() -> None:
    run = Run()
    run.start()
    run.steps(3)
    run.steps(1, is_skipped=True)
    run.shows(elapsed_s=4.0, lost_s=0.0, goodput=3 / 4)


def test_going_back_for_a_bad_loss_loses_the_steps_without_a_restart() -> None:
    run = Run()
    run.start()
    run.steps(10)
    run.records = run.records[:6]
    run.clock += 2.0
    run.goodput.go_back(run.records, now=run.clock)
    run.steps(4)
    run.shows(elapsed_s=16.0, lost_s=6.0, goodput=10 / 16, restarts=0)


def test_a_clock_set_back_does_not_make_time_negative() -> None:
    run = Run()
    run.start()
    run.steps(5)
    run.clock -= 100.0
    run.start(kept=5)
    run.steps(5)
    run.shows(elapsed_s=10.0, lost_s=0.0, goodput=1.0, restarts=1)


def test_the_account_goes_on_without_the_file_of_attempts() -> None:
    run = Run()
    run.start()
    run.steps(10)
    run.clock += 8.0
    run.attempts = ()
    run.start(kept=6)
    run.steps(4)
    run.shows(elapsed_s=22.0, lost_s=12.0, goodput=10 / 22, restarts=1)


def test_attempts_come_back_from_their_file(tmp_path: Path) -> None:
    attempts = [Attempt(began=0.1 + 0.2, idle_s=0.0, step=0, world_size=4, device="cpu")]
    attempts.append(Attempt(began=9.5, idle_s=3.25, step=7, world_size=3, device="cuda"))
    file = str(tmp_path / "work" / "attempts.jsonl")
    assert read_attempts(file) == []
    write_attempts(file, attempts)
    assert read_attempts(file) == attempts


def test_a_torn_file_of_attempts_is_none_at_all_and_storage_that_refuses_ends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "attempts.jsonl"
    file.write_text('{"began": 1.0, "idle_')
    assert read_attempts(str(file)) == []
    write_attempts(str(file / "below_a_file"), [])
    assert file.read_text() == '{"began": 1.0, "idle_'
