import logging
import random
from dataclasses import dataclass, field
from typing import Literal

import pytest

from ray_ds.train.cadence import SnapshotCadence


@dataclass
class Simulation:
    """Training whose snapshots stall it, then slow it down while they travel."""

    step_s: float
    stall_s: float = 0.0
    transfer_s: float = 0.0
    slowdown: float = 0.0
    """Part by which a step takes longer while a snapshot travels."""
    jitter: float = 0.0
    """Part by which a step's time varies."""
    validate_s: float = 0.0
    """Time of a look at the validation loss, every 50 steps."""
    cadence: SnapshotCadence = field(default_factory=lambda: SnapshotCadence("auto"))
    taken: list[int] = field(default_factory=list)
    """Steps after which a snapshot was taken."""
    cost_s: float = 0.0
    total_s: float = 0.0
    worst_loss_s: float = 0.0

    def run(self, steps: int) -> "Simulation":
        varying = random.Random(0)
        safe_at = 0.0  # when the newest snapshot that has arrived was taken
        sent_at, arrives_at = 0.0, 0.0
        for step in range(1, steps + 1):
            started = self.total_s + (self.validate_s if step % 50 == 0 else 0.0)
            stall = 0.0
            if self.taken and self.taken[-1] == step - 1:
                stall = max(0.0, arrives_at - started) + self.stall_s
                sent_at, arrives_at = self.total_s, started + stall + self.transfer_s
            plain = self.step_s * varying.uniform(1 - self.jitter, 1 + self.jitter)
            seconds = plain + self.slowdown * max(0.0, min(plain, arrives_at - started - stall))
            other, self.total_s = started - self.total_s, started + stall + seconds
            self.cost_s += stall + seconds - plain
            if safe_at < sent_at and arrives_at <= self.total_s:
                self.worst_loss_s = max(self.worst_loss_s, arrives_at - safe_at)
                safe_at = sent_at
            self.worst_loss_s = max(self.worst_loss_s, self.total_s - safe_at)
            self.cadence.record(seconds, stall_s=stall, is_sending=arrives_at > self.total_s, other_s=other)
            if self.cadence.is_due():
                self.taken.append(step)
        return self

    @property
    def overhead(self) -> float:
        return self.cost_s / self.total_s


def num_steps(step_s: float) -> int:
    """Return the steps of an hour, but no more than make a test slow."""
    return min(int(3600 / step_s), 6000)


AFFORDABLE = [
    (step_s, *costs)
    for step_s in (0.01, 0.1, 1.0, 3.0, 7.0)
    for costs in ((0.001, 0.01, 0.1), (0.05, 0.5, 0.2), (0.05, 2.0, 0.1), (0.15, 1.0, 0.0))
]


@pytest.mark.shows(
    "Snapshots cost at most 2 % of the time and a killed node at most 30 s of work, where both can be had"
)
@pytest.mark.parametrize("jitter", [0.0, 0.05])
@pytest.mark.parametrize(("step_s", "stall_s", "transfer_s", "slowdown"), AFFORDABLE)
def test_overhead_and_loss_stay_within_bounds(
    step_s: float, stall_s: float, transfer_s: float, slowdown: float, jitter: float
) -> None:
    run = Simulation(step_s, stall_s, transfer_s, slowdown, jitter=jitter).run(num_steps(step_s))
    measuring_s = stall_s + slowdown * transfer_s  # the first snapshot, which nothing is known about
    assert run.cost_s - measuring_s <= 0.02 * run.total_s
    assert run.worst_loss_s <= 30


@pytest.mark.parametrize("jitter", [0.0, 0.05])
@pytest.mark.parametrize("step_s", [0.01, 0.1, 1.0, 3.0, 7.0])
def test_lost_work_counts_where_both_bounds_cannot_be_had_and_the_log_says_so_once(
    step_s: float, jitter: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        run = Simulation(step_s, stall_s=1.5, transfer_s=4.0, slowdown=0.1, jitter=jitter).run(num_steps(step_s))
    assert run.worst_loss_s <= 30.01 + step_s * jitter
    assert 0.02 < run.overhead < 0.2
    (line,) = caplog.messages
    told = float(line.split("overhead=")[1].split()[0])
    assert told == pytest.approx(run.overhead, rel=0.5)
    assert "wanted=0.02" in line and 'reason="a killed node is to cost at most 30 s"' in line


def test_process_that_does_not_speak_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        Simulation(1.0, stall_s=3.0, cadence=SnapshotCadence("auto", is_speaking=False)).run(200)
    assert not caplog.messages


def test_first_snapshot_is_early_and_the_slow_first_step_does_not_count() -> None:
    cadence = SnapshotCadence("auto")
    due = []
    for step_s in (20.0, 0.1, 0.1, 0.1):
        cadence.record(step_s)
        due.append(cadence.is_due())
    assert due == [False, False, True, False]
    assert cadence.overhead == pytest.approx(0)


def test_first_step_of_minutes_is_worth_a_snapshot_at_once() -> None:
    cadence = SnapshotCadence("auto")
    cadence.record(300.0)
    assert cadence.is_due()


def test_cheap_snapshots_are_taken_often_and_dear_ones_seldom() -> None:
    cheap = Simulation(0.1, stall_s=0.002).run(1000)
    dear = Simulation(0.1, stall_s=0.2).run(1000)
    assert cheap.taken[-1] - cheap.taken[-2] == 2
    assert dear.taken[-1] - dear.taken[-2] == pytest.approx(98, abs=1)


def test_next_snapshot_waits_until_the_last_one_has_arrived() -> None:
    run = Simulation(1.0, stall_s=0.1, transfer_s=45.0).run(600)
    assert run.overhead < 0.01
    assert all(later - earlier >= 45 for earlier, later in zip(run.taken, run.taken[1:], strict=False))


def test_validation_counts_as_work_that_could_be_lost_but_not_as_cost_of_a_snapshot() -> None:
    run = Simulation(0.1, stall_s=0.05, transfer_s=0.5, validate_s=20.0).run(3000)
    assert run.worst_loss_s <= 30
    assert run.overhead <= 0.02
    assert run.cadence.overhead == pytest.approx(0.05 / (run.cadence.interval_steps * 0.1 + 0.05))


def test_interval_follows_when_the_cost_changes() -> None:
    run = Simulation(0.1, stall_s=0.1).run(500)
    run.stall_s = 0.01
    run.run(1000)
    assert run.cadence.interval_steps == 5


def test_fixed_interval_is_kept_and_zero_means_none() -> None:
    assert Simulation(0.1, cadence=SnapshotCadence(7)).run(30).taken == [7, 14, 21, 28]
    assert Simulation(100.0, cadence=SnapshotCadence(0)).run(30).taken == []


def test_same_figures_make_the_same_decisions() -> None:
    one, other = Simulation(0.3, 0.03, 1.0, 0.2, jitter=0.3), Simulation(0.3, 0.03, 1.0, 0.2, jitter=0.3)
    other.cadence = SnapshotCadence("auto", is_speaking=False)
    assert one.run(2000).taken == other.run(2000).taken


@pytest.mark.parametrize("setting", ["auto", 100])
def test_snapshot_that_is_wanted_is_due_at_once(setting: Literal["auto"] | int) -> None:
    cadence = SnapshotCadence(setting)
    cadence.record(0.1)
    assert not cadence.is_due()
    cadence.take_now()
    assert cadence.is_due()
    cadence.record(0.1)
    assert not cadence.is_due()
