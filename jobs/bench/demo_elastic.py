"""Train while a node is killed, one is added and one is drained, and once undisturbed; compare the two loss curves.

    make demo-elastic

Runs on the local cluster of `make up`. At a quarter of the steps a node with a worker loses power, at half of them a
new node joins, at three quarters one gets a spot notice. Ends with a picture of both curves and a table of losses.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Something that happens to the cluster once a part of the steps is done."""

    name: str
    after: float
    """Part of the steps."""
    command: tuple[str, ...]


DISTURBANCES = (
    Disturbance(name="worker-1 loses power", after=0.25, command=(NODE, "kill", "worker-1")),
    Disturbance(name="a node joins", after=0.5, command=(NODE, "add")),
    Disturbance(name="worker-2 gets a spot notice", after=0.75, command=(NODE, "drain", "worker-2", str(DRAIN_S))),
)


def main() -> None:
    """Run the recipe's steps, disturb the last one, and show the result."""
    recipe = load_recipe(RECIPE, overrides=sys.argv[1:], root=os.getcwd())
    subprocess.run(["ray-ds", "sample-text", "runs/sample_text"], check=True)
    for name in ("clean", "tokenizer", "tokenize", "quiet"):
        if find_finished(recipe, recipe.step(name)) is None:
            subprocess.run(["ray-ds", "submit", name, RECIPE, *sys.argv[1:]], check=True)
    elastic = recipe.step("elastic")
    notes: list[dict[str, Any]] = []
    if find_finished(recipe, elastic) is None:
        notes = run_disturbed(recipe)
        (Path(recipe.run_dir) / "disturbances.json").write_text(json.dumps(notes))
        start_again()
    else:
        print("the elastic run is finished; delete its artefact to disturb it again")
        notes = json.loads((Path(recipe.run_dir) / "disturbances.json").read_text())
    show(recipe, notes)


def run_disturbed(recipe: Recipe) -> list[dict[str, Any]]:
    """Submit the elastic step, disturb it as it goes, and return what happened when."""
    step = recipe.step("elastic")
    live = Path(step_uri(recipe, step)) / "work" / "metrics.jsonl"
    job = subprocess.Popen(["ray-ds", "submit", "elastic", RECIPE, *sys.argv[1:]])
    notes: list[dict[str, Any]] = []
    most = 0
    while job.poll() is None:
        done = live.read_text().count("\n") if live.exists() else most
        if done < most and notes:
            notes[-1]["steps_again"] += most - done
        most = done
        if len(notes) < len(DISTURBANCES) and done >= DISTURBANCES[len(notes)].after * step.settings.num_steps:
            disturbance = DISTURBANCES[len(notes)]
            notes.append({"what": disturbance.name, "step": done, "time": time.time(), "steps_again": 0})
            print(f"\n>>> step {done}: {disturbance.name}", flush=True)
            subprocess.run(disturbance.command, check=True)
        time.sleep(POLL_S)
    if job.returncode:
        sys.exit(f"the elastic run ended with exit status {job.returncode}")
    return notes


def start_again() -> None:
    """Start the nodes that were taken down, once those that drained have ended."""
    deadline = time.monotonic() + DRAIN_S
    while "changing" in (states := node_states()).values() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for name, state in states.items():
        if state == "down":
            subprocess.run([NODE, "start", name], check=True)


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
