"""Train while a node is killed, one is added and one is drained, and once undisturbed; compare the two loss curves.

    make demo-elastic

Runs on the local cluster of `make up`. At a quarter of the steps a node with a worker is killed, at half of them a new
node joins, at three quarters one gets a spot notice. Ends with a picture of both curves and a table of losses; the
cluster has the nodes that it had.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ray_ds.logs import table_lines
from ray_ds.recipe import Recipe, load_recipe
from ray_ds.steps import find_finished, step_uri
from ray_ds.train.metrics import Record, decode

RECIPE = "jobs/recipes/demo_elastic.toml"
NODE = "cluster/local/node.sh"
PICTURE = "curves.png"
DRAIN_S = 60
END_WAIT_S = 10.0
"""Time that a node which drains has beyond its deadline."""
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Something that happens to the cluster once a part of the steps is done."""

    name: str
    after: float
    """Part of the steps."""
    command: tuple[str, ...]
    ends: str | None = None
    """The node that goes."""


DISTURBANCES = (
    Disturbance(name="worker-1 is killed", after=0.25, command=(NODE, "kill", "worker-1"), ends="worker-1"),
    Disturbance(name="a node joins", after=0.5, command=(NODE, "add")),
    Disturbance(
        name="worker-2 gets a spot notice",
        after=0.75,
        command=(NODE, "drain", "worker-2", str(DRAIN_S)),
        ends="worker-2",
    ),
)


def main() -> None:
    """Run the recipe's steps, disturb the last one, and show the result."""
    recipe = load_recipe(RECIPE, overrides=sys.argv[1:], root=os.getcwd())
    subprocess.run(["ray-ds", "sample-text", "runs/sample_text"], check=True)
    for name in ("clean", "tokenizer", "tokenize", "quiet"):
        if find_finished(recipe, recipe.step(name)) is None:
            subprocess.run(["ray-ds", "submit", name, RECIPE, *sys.argv[1:]], check=True)
    if find_finished(recipe, recipe.step("elastic")) is None:
        before = set(node_states())
        notes: list[dict[str, Any]] = []
        try:
            status = run_disturbed(recipe, notes)
        finally:
            notes_file(recipe).write_text(json.dumps(notes))
            bring_back(before, DISTURBANCES[: len(notes)])
        if status:
            sys.exit(f"the elastic run ended with exit status {status}; the same command goes on with it")
    else:
        print("the elastic run is finished; delete its artefact to disturb it again")
    show(recipe, read_notes(recipe))


def notes_file(recipe: Recipe) -> Path:
    """Return where the disturbances of the elastic step's run are written down."""
    digest = Path(step_uri(recipe, recipe.step("elastic"))).name
    return Path(recipe.run_dir) / f"disturbances-{digest}.json"


def read_notes(recipe: Recipe) -> list[dict[str, Any]]:
    """Return what happened when; nothing, and a word, where a run was finished without this command."""
    file = notes_file(recipe)
    if not file.exists():
        print(f"nothing is known of disturbances: there is no {file}")
        return []
    notes: list[dict[str, Any]] = json.loads(file.read_text())
    return notes


def count_steps(live: Path, known: int) -> int:
    """Return the steps in a run's live metrics; `known`, those seen last, where the file is not there.

    A run that goes back writes its file anew, so fewer steps count once a second look has found them too.
    """
    for delay_s in (POLL_S, 0.0):
        if not live.exists():
            return known
        if (steps := live.read_text().count("\n")) >= known:
            return steps
        time.sleep(delay_s)
    return steps


def run_disturbed(recipe: Recipe, notes: list[dict[str, Any]]) -> int:
    """Submit the elastic step, disturb it as it goes, and return its job's exit status.

    Args:
        notes: is given what happens, as it does.
    """
    step = recipe.step("elastic")
    live = Path(step_uri(recipe, step)) / "work" / "metrics.jsonl"
    job = subprocess.Popen(["ray-ds", "submit", "elastic", RECIPE, *sys.argv[1:]])
    most = 0
    while job.poll() is None:
        done = count_steps(live, most)
        if done < most and notes:
            notes[-1]["steps_again"] += most - done
        most = done
        if len(notes) < len(DISTURBANCES) and done >= DISTURBANCES[len(notes)].after * step.settings.num_steps:
            disturbance = DISTURBANCES[len(notes)]
            notes.append({"what": disturbance.name, "step": done, "time": time.time(), "steps_again": 0})
            print(f"\n>>> step {done}: {disturbance.name}", flush=True)
            subprocess.run(disturbance.command, check=True)
        time.sleep(POLL_S)
    return job.returncode


def bring_back(before: Collection[str], happened: Sequence[Disturbance]) -> None:
    """Start the nodes that went, once those that drain have ended, and end those that joined.

    Args:
        before: names of the nodes that there were.
    """
    gone = {disturbance.ends for disturbance in happened if disturbance.ends}
    deadline = time.monotonic() + DRAIN_S + END_WAIT_S
    while any(node_states()[name] != "down" for name in gone) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for name, state in node_states().items():
        if name in gone and state == "down":
            subprocess.run([NODE, "start", name], check=True)
        elif name not in before:
            subprocess.run([NODE, "kill", name], check=True)


def node_states() -> dict[str, str]:
    """Return up, changing or down by the node's name."""
    listed = subprocess.run([NODE, "list"], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return {name: state for name, _, state, _ in rows}


def show(recipe: Recipe, notes: Sequence[Mapping[str, Any]]) -> None:
    """Draw both curves, print what was lost, and the figures as JSON."""
    quiet, elastic = (read_records(recipe, name) for name in ("quiet", "elastic"))
    differences = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(quiet, elastic, strict=True)]
    picture = Path(recipe.run_dir) / PICTURE
    draw(quiet, elastic, differences, notes, picture)
    rows = [("what happened", "after step", "workers", "steps run again", "seconds without a step")]
    rows += [describe(note, elastic) for note in notes]
    print("\n".join(["", *table_lines(rows), ""]))
    last = elastic[-1]
    figures = {
        "largest_relative_loss_difference": max(differences),
        "final_loss_quiet": quiet[-1]["loss"],
        "final_loss_elastic": last["loss"],
        "restarts": last["restarts"],
        "lost_s": last["lost_s"],
        "goodput": last["goodput"],
        "steps_again": sum(note["steps_again"] for note in notes),
    }
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):34} {value:.6g}")
    print(f"{'both curves':34} {picture}")
    print(json.dumps({"name": "demo_elastic", "inputs": {"recipe": RECIPE}, "figures": figures, "peers": {}}))


def read_records(recipe: Recipe, name: str) -> list[Record]:
    """Return the records of a finished step."""
    return decode((Path(step_uri(recipe, recipe.step(name))) / "metrics.jsonl").read_text())


def describe(note: Mapping[str, Any], records: Sequence[Record]) -> tuple[str, ...]:
    """Return a row of the table: the restart that followed on a disturbance."""
    for before, after in itertools.pairwise(records):
        if after["restarts"] > before["restarts"] and after["time"] > note["time"]:
            workers = f"{before['world_size']:.0f} -> {after['world_size']:.0f}"
            gap = after["time"] - after["seconds"] - before["time"]
            return note["what"], str(note["step"]), workers, str(note["steps_again"]), f"{gap:.1f}"
    return note["what"], str(note["step"]), "as before", "0", "0.0"


def draw(
    quiet: Sequence[Record],
    elastic: Sequence[Record],
    differences: Sequence[float],
    notes: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """Write a PNG of both losses, how far they are apart, and the number of workers."""
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1, 1))
    steps = [record["step"] for record in quiet]
    upper.plot(steps, [record["loss"] for record in quiet], linewidth=3, color="lightgrey", label="undisturbed")
    upper.plot(steps, [record["loss"] for record in elastic], linewidth=1, color="tab:blue", label="disturbed")
    for note in notes:
        upper.axvline(note["step"], color="tab:red", linewidth=0.8, linestyle="--")
        upper.text(note["step"], upper.get_ylim()[1], f" {note['what']}", va="top", fontsize=8, color="tab:red")
    upper.set_ylabel("loss, nats a token")
    upper.legend()
    middle.semilogy(steps, [max(value, 1e-9) for value in differences], linewidth=1)
    middle.set_ylabel("difference,\nrelative")
    lower.step(steps, [record["world_size"] for record in elastic], where="post", linewidth=1)
    lower.set_ylabel("workers")
    lower.set_xlabel("step")
    for axes in (upper, middle, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
