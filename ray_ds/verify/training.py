"""Training: the same losses with any number of workers, and a checkpoint that another number of workers reads."""

import threading
from functools import partial

from pydantic import JsonValue

from ray_ds.train.metrics import Record
from ray_ds.verify.context import Context
from ray_ds.verify.disturbed import train_paced
from ray_ds.verify.finding import Finding, Problem, judged, not_applicable
from ray_ds.verify.made_up import commit_model
from ray_ds.verify.tiny_training import (
    MOST_WORKERS,
    STEPS,
    Trained,
    judge_losses,
    largest_difference,
    train_tiny,
    wait_for_room,
)

NAME = "training"
STOP_AFTER = 3
PACE_S = 0.4


def no_room(context: Context, name: str) -> Finding:
    """Return the finding that not even one worker fits."""
    unit = "GPU and CPU are" if context.gpus else "CPU is"
    return not_applicable(name, f"no {unit} free for a worker; run it again when the cluster is idle")


def check_training(context: Context) -> Finding:
    """Train with 1, 2, up to 4 workers; stop a run of the most and go on with another number."""
    most = wait_for_room(context, MOST_WORKERS)
    if not most:
        return no_room(context, NAME)
    runs = {size: train_tiny(context, f"workers-{size}", num_workers=size) for size in range(1, most + 1)}
    first = runs[1]
    context.made.model = commit_model(first.run, first.settings)
    differences = {f"with {size} workers": largest_difference(first.records, runs[size].records) for size in runs}
    stopped, resumed = _stop_and_resume(context, most)
    problems = judge_resume(stopped, resumed)
    if not problems:
        differences[f"stopped with {most} and resumed with {_other(most)} workers"] = largest_difference(
            first.records, resumed.records
        )
    problems += judge_losses(differences, "with 1 worker")
    figures: dict[str, JsonValue] = {
        "workers": list(runs),
        "largest_loss_difference": max(differences.values()),
        "differences": {name: float(difference) for name, difference in differences.items()},
        "stopped_at_step": stopped.stopped_at,
        "first_loss": float(first.records[0]["loss"]),
        "last_loss": float(first.records[-1]["loss"]),
        "seconds_by_workers": {str(size): round(run.seconds, 1) for size, run in runs.items()},
    }
    advice = [f"one {'GPU' if context.gpus else 'CPU'} was free: no other number of workers was tried"]
    return judged(NAME, figures, problems, advice if most == 1 else [])


def _other(most: int) -> int:
    """Return the number of workers that go on where `most` stopped."""
    return max(1, most - 1)


def _stop_and_resume(context: Context, most: int) -> tuple[Trained, Trained]:
    """Stop a run in the middle and go on with another number of workers."""
    stop = threading.Event()

    def stop_soon(record: Record) -> None:
        if record["step"] >= STOP_AFTER:
            stop.set()

    loop = partial(train_paced, pace_s=PACE_S)
    name = "stopped"
    stopped = train_tiny(context, name, num_workers=most, loop=loop, on_record=stop_soon, stop=stop)
    return stopped, train_tiny(context, name, num_workers=_other(most))


def judge_resume(stopped: Trained, resumed: Trained) -> list[Problem]:
    """Return why a run that was stopped did not go on where it was."""
    if stopped.stopped_at is None:
        wrong = f"training was told to stop after step {STOP_AFTER} and went on to the end, step {STEPS}"
        return [Problem(wrong=wrong, action="see the log of Ray Train's controller (`ray logs`)")]
    begun = min((int(event.facts["step"]) for event in resumed.events if event.kind == "stepping"), default=0)  # type: ignore[arg-type]
    if begun <= stopped.stopped_at:
        wrong = f"a run stopped after step {stopped.stopped_at} went on at step {begun}: its checkpoint was not found"
        return [Problem(wrong=wrong, action="see the storage check: every node must read what another wrote")]
    return []
