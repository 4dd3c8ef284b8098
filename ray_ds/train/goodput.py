"""How much of a run's time was spent on steps that count, over all restarts and submissions.

Nothing has to live for it: it goes on from a checkpoint's last record and from a small file that says when attempts
began. An attempt is what one group of processes does between two (re)starts.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ray_ds import storage
from ray_ds.logs import log_event

ATTEMPTS = "attempts.jsonl"
"""The file's name, in the folder of the checkpoints."""
TYPICAL_STEPS = 50
"""Steps whose median duration is that of a typical step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A group of processes that began to train."""

    began: float
    """When its first step began, in Unix seconds."""
    idle_s: float
    """How long there was no job at all before its own job was submitted."""
    step: int
    """Steps done when it began."""
    world_size: int
    device: str
    """What its processes computed on: `cpu` or `cuda`."""


class Goodput:
    """The account of a run's time.

    - **Elapsed** is the time since the run's first step began, but for the time without a job: from the last sign of
      one submission to the start of the next. Who waits to submit again loses nothing that training could save.
    - **Useful** is the duration of the steps that are still part of the run and changed the weights, each once. Of an
      attempt's first step after a restart, which also compiles and warms up, no more than a typical step counts.
    - **Goodput** is useful / elapsed.
    - **Lost** is what restarts cost: from the end of the last step that was kept to the beginning of the next one
      (steps that run again, finding a death, waiting for nodes, starting, loading), and what the first step takes
      longer. Going back to a checkpoint because of a bad loss loses in the same way.

    What is neither useful nor lost goes into checkpoints, snapshots, validation and skipped steps. The last sign of a
    submission is the newest of the kept record, the live metrics file (run directories on a file system only) and the
    attempt's beginning: without the live file, steps that a submission lost at its very end count as no time at all.

    Times of different attempts are of different nodes' wall clocks, and the driver's for `job_started`. Each restart is
    counted wrong by as much as they differ, never below zero: milliseconds with NTP, which a cluster needs anyhow.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, float]],
        attempts: Sequence[Attempt],
        *,
        now: float,
        job_started: float,
        last_sign: float | None,
        world_size: int,
        device: str,
    ) -> None:
        """Go on, at the beginning of an attempt's first step.

        Args:
            records: the kept ones, from the run's first step to the last before this attempt.
            attempts: the earlier ones.
            now: Unix seconds.
            job_started: when this submission began, in Unix seconds.
            last_sign: newest time in the live metrics file, before it was cut.
            world_size: processes of this attempt.
            device: what they compute on.
        """
        signs = [records[-1]["time"]] if records else []
        signs += [attempts[-1].began] if attempts else []
        signs += [last_sign] if last_sign is not None else []
        idle_s = max(0.0, job_started - max(signs)) if signs else 0.0
        step = int(records[-1]["step"]) if records else 0
        this = Attempt(began=now, idle_s=idle_s, step=step, world_size=world_size, device=device)
        self.attempts = (*attempts, this)
        self.restarts = max(len(attempts), int(records[-1]["restarts"]) + 1 if records else 0)
        self._is_warm = self.restarts == 0
        self._since = now
        self._go_on(records, now)

    def _go_on(self, records: Sequence[Mapping[str, float]], now: float) -> None:
        """Take the account from the last kept record, and count the time since then as lost."""
        first = self.attempts[0].began
        last: Mapping[str, float] = {"time": first, "elapsed_s": 0.0, "lost_s": 0.0, "goodput": 0.0}
        last = records[-1] if records else last
        idle_s = sum(attempt.idle_s for attempt in self.attempts if attempt.began > last["time"])
        gap = max(0.0, now - last["time"] - idle_s)
        self._elapsed_s = last["elapsed_s"] + gap
        self._lost_s = last["lost_s"] + gap
        self._useful_s = last["goodput"] * last["elapsed_s"]
        self._since = now
        self._durations = [record["seconds"] for record in records[-TYPICAL_STEPS:]]

    def go_back(self, records: Sequence[Mapping[str, float]], *, now: float) -> None:
        """Count the steps after `records` as lost, for they will run again or were for nothing."""
        self._go_on(records, now)

    def count(self, seconds: float, *, now: float, is_skipped: bool = False) -> dict[str, float | int]:
        """Count a step that took `seconds` and ended at `now`; return `time` and the account's figures."""
        counted = seconds
        if not self._is_warm and self._durations:
            counted = min(seconds, statistics.median(self._durations))
            self._lost_s += seconds - counted
        self._is_warm = True
        self._useful_s += 0.0 if is_skipped else counted
        self._elapsed_s += max(seconds, now - self._since)
        self._since = now
        self._durations = [*self._durations[1 - TYPICAL_STEPS :], seconds]
        return {
            "time": now,
            "elapsed_s": self._elapsed_s,
            "lost_s": self._lost_s,
            "goodput": self._useful_s / self._elapsed_s if self._elapsed_s else 1.0,
            "restarts": self.restarts,
        }


def read_attempts(uri: str) -> list[Attempt]:
    """Return the attempts that a file tells of: none where there is no file, or none that can be read."""
    try:
        if not storage.exists(uri):
            return []
        return [Attempt(**json.loads(line)) for line in storage.read_bytes(uri).decode().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        log_event("attempts_unreadable", file=uri, error=str(error))
        return []


def write_attempts(uri: str, attempts: Sequence[Attempt]) -> None:
    """Keep the attempts for the next one, as JSON lines; storage that refuses costs figures, not training."""
    lines = "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts)
    try:
        storage.write_bytes(uri, lines.encode())
    except OSError as error:
        log_event("attempts_not_kept", file=uri, error=str(error))
