"""A worker that is killed and one that joins: training goes on, with the same losses, after a measured time."""

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.on_ray.nodes import usable_nodes
from ray_ds.train.metrics import Record
from ray_ds.verify.context import Context
from ray_ds.verify.disturbed import train_and_die, train_paced
from ray_ds.verify.finding import Finding, Problem, judged, not_applicable
from ray_ds.verify.on_nodes import place_on
from ray_ds.verify.tiny_training import (
    STEPS,
    Trained,
    judge_losses,
    largest_difference,
    train_tiny,
    wait_for_room,
    worker_need,
)
from ray_ds.verify.training import no_room

KILL = "kill"
JOIN = "join"
KILL_AFTER_S = 8.0
"""Time for spare processes to start, as there is in a real run."""
KILL_PACE_S = 0.4
JOIN_PACE_S = 1.5
"""STEPS of them are how long a run waits for its second worker."""
ALONE_STEPS = 3
GOOD_KILL_S = 20.0
GOOD_JOIN_S = 40.0
HOLD_TIMEOUT_S = 30.0
PAUSE_S = 0.5


def check_kill(context: Context) -> Finding:
    """Kill a worker of two, or the only one, and see training go on."""
    most = wait_for_room(context, 2)
    if not most:
        return no_room(context, KILL)
    marker = context.work(KILL, "killed.json")
    loop = partial(train_and_die, marker=marker, after_s=KILL_AFTER_S, pace_s=KILL_PACE_S)
    disturbed = train_tiny(context, "killed", num_workers=(1, 2) if most == 2 else 1, loop=loop)
    quiet = train_tiny(context, "quiet-kill", num_workers=1)
    if not storage.exists(marker):
        wrong = f"training came to its end before a worker was killed, in {disturbed.seconds:.0f} s"
        return judged(KILL, {}, [Problem(wrong=wrong, action="run it again with --only kill")])
    note = json.loads(storage.read_bytes(marker))
    return judge_kill(note, disturbed, quiet)


def judge_kill(note: dict[str, float], disturbed: Trained, quiet: Trained) -> Finding:
    """Return the finding of a run whose worker was killed at the time and step of `note`."""
    after = [record for record in disturbed.records if record["time"] > note["time"] and record["restarts"] >= 1]
    difference = largest_difference(quiet.records, disturbed.records)
    problems = judge_losses({"of a run whose worker was killed": difference}, "of an undisturbed run")
    figures: dict[str, JsonValue] = {
        "workers": note["workers"],
        "killed_after_step": note["step"],
        "largest_loss_difference": float(difference),
    }
    if not after:
        wrong = f"no step followed on the death of a worker after step {note['step']:.0f}"
        return judged(KILL, figures, [*problems, Problem(wrong=wrong, action="see `ray logs` for the workers' errors")])
    figures["kill_to_step_s"] = kill_to_step_s = after[0]["time"] - note["time"]
    figures["steps_again"] = max(0, int(note["step"]) - int(after[0]["step"]) + 1)
    advice = []
    if kill_to_step_s > GOOD_KILL_S:
        advice.append(f"{kill_to_step_s:.0f} s from kill to next step: see that nodes are idle and start Python fast")
    return judged(KILL, figures, problems, advice)


class Placeholder:
    """Holds resources while it lives."""

    def ready(self) -> bool:
        """Say that it has them."""
        return True


def check_join(context: Context) -> Finding:
    """Let training start with room for one worker, then make room for a second one."""
    if wait_for_room(context, 2) < 2:
        return not_applicable(JOIN, "there is room for one worker only; a second one could not join")
    held = _hold_all_but_one(context)
    released: list[float] = []
    grown: list[float] = []

    def release_and_watch(record: Record) -> None:
        if record["step"] >= ALONE_STEPS and not released:
            released.append(time.monotonic())
            for holder in held:
                ray.kill(holder)
        if record["world_size"] >= 2 and not grown:
            grown.append(time.monotonic())

    loop = partial(train_paced, pace_s=JOIN_PACE_S, below=2)
    joined = train_tiny(context, "joined", num_workers=(1, 2), loop=loop, on_record=release_and_watch)
    quiet = train_tiny(context, "quiet-join", num_workers=1)
    join_s = grown[0] - released[0] if grown and released else None
    return judge_join(joined, quiet, join_s)


def _hold_all_but_one(context: Context) -> list[Any]:
    """Hold what is free on all nodes, but for one worker's room."""
    need = worker_need(context)
    holders: list[Any] = []
    kept = False
    by_id = {node.node_id: node for node in context.nodes}
    for node in usable_nodes(need, {}, 1_000_000):
        count = node.free if kept else max(0, node.free - 1)
        kept = kept or node.free > 0
        if not count or node.node_id not in by_id:
            continue
        amounts = {"num_cpus": count * need["CPU"], "num_gpus": count * need.get("GPU", 0)}
        actor = ray.remote(**amounts, max_restarts=0)(Placeholder)
        holder = actor.options(scheduling_strategy=place_on(by_id[node.node_id])).remote()
        context.clean_up.add(partial(ray.kill, holder))
        holders.append(holder)
    ray.get([holder.ready.remote() for holder in holders], timeout=HOLD_TIMEOUT_S)
    time.sleep(PAUSE_S)  # until Ray's view of free resources has it
    return holders


def judge_join(joined: Trained, quiet: Trained, join_s: float | None) -> Finding:
    """Return the finding of a run that a second worker could join."""
    difference = largest_difference(quiet.records, joined.records)
    problems = judge_losses({"of a run that a worker joined": difference}, "of an undisturbed run")
    figures: dict[str, JsonValue] = {
        "steps_alone": sum(record["world_size"] == 1 for record in joined.records),
        "largest_loss_difference": float(difference),
    }
    if join_s is None:
        wrong = f"training did not grow though there was room, in {STEPS} steps of {JOIN_PACE_S:g} s and more"
        action = "see the board's lines in the job's log (pause_asked, resizing) and `ray status`"
        return judged(JOIN, figures, [*problems, Problem(wrong=wrong, action=action)])
    figures["join_to_used_s"] = join_s
    figures["steps_lost"] = _steps_lost(joined.records)
    advice = [f"{join_s:.0f} s until a second worker was used: see that nodes are idle"] if join_s > GOOD_JOIN_S else []
    return judged(JOIN, figures, problems, advice)


def _steps_lost(records: Sequence[Record]) -> int:
    """Return how many steps are missing in the records of a whole run."""
    return STEPS - len({record["step"] for record in records})
