"""Soaks: steps of the mini recipe are killed at random, round after round, and must give the bytes of a quiet run.

`make soak` runs them, a quarter of an hour on 2 cores; `make test` leaves them out. A round submits a step as a user
does (`ray-ds submit`), sends SIGKILL when a drawn share of the work is done and a drawn part of a second has passed,
and submits again when the job's driver was killed, until the step is finished. What is killed:

    worker   one process that does the step's work, a Ray Data task or a Ray Train worker
    node     a worker node: its raylet, workers and agents at once; it is started again
    driver   the job's own process

Only processes below those that `up.sh` recorded for this test's cluster are killed. Every round must give what the
quiet run gave: cleaning the sha256 of every file, training every figure of every step to the last bit and the same
model files. And a kill may cost no more than what was under way.

The results are kept in `soak_results/<step>.json` beside this file: seed, seconds, the outcome, and for every round
what was killed when, how often the step was submitted, how many units or steps were done again. A round that breaks off
stands there as `unfinished`. The same seed draws the same schedule; which process it meets depends on the machine.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import pytest

from ray_ds.data.sample_text import king_james_chapters
from tests.end_to_end.conftest import BIN, PROJECT, SOAK_RESULTS, Site
from tests.train.runs import curve

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

Kind = Literal["worker", "node", "driver"]
Process = tuple[int, str]
"""Its id, and its command as it stands or as the process has renamed itself."""

RECIPE = "jobs/recipes/mini.toml"
SEED = 10
STEPS, CHECKPOINT_EVERY = 60, 5
NUM_CPUS = 5
"""Of the local cluster: as many units of cleaning run at a time."""
MAX_DELAY_S = 0.5
POLL_S = 0.05
START_NODE = """
. "$1"; state=$2 name=$3; shift 3
setsid "$@" >>"$state/$name.log" 2>&1 </dev/null &
record "$!" "$name" >>"$state/processes"
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A step, how it is soaked, and what its artefact tells."""

    step: str
    """Its name in the mini recipe, and its stage's."""
    overrides: tuple[str, ...]
    unit: str
    """What it does many of."""
    victims: Mapping[Kind, str]
    """What is killed: by kind what a process's command, or a node's name, begins with."""
    num_rounds: int
    kills_a_round: int
    count_done: Callable[[Path], int]
    """From the artefact's folder, finished or not, to units or steps done."""
    max_repeats: int
    """What a kill may cost, in units or steps."""
    read_result: Callable[[Path], dict[str, Any]]
    """What must be as in the quiet run, by name."""


@dataclass(kw_only=True)
class Round:
    """What happened in a round, as it is kept."""

    number: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    submissions: int = 0
    repeats: int = 0
    seconds: float = 0.0
    outcome: str = "unfinished"


def find_nodes(state: Path) -> dict[str, list[Process]]:
    """Return the processes of each living node of a cluster by its name; the first is the one that `up.sh` recorded."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    children: dict[int, list[Process]] = defaultdict(list)
    for line in listing.stdout.splitlines():
        pid, parent, title = line.split(None, 2)
        children[int(parent)].append((int(pid), title))
    nodes: dict[str, list[Process]] = {}
    for line in (state / "processes").read_text().splitlines():
        pid, started, name = line.split()
        if start_time(pid) == started:
            nodes[name] = [(int(pid), name)]
            for member in nodes[name]:  # which grows while it is walked
                nodes[name] += children[member[0]]
    return nodes


def start_time(pid: str) -> str | None:
    """Return what `processes.sh` records of a process beside its id; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def kill_one(state: Path, subject: Subject, kind: Kind, rng: random.Random) -> str | None:
    """Kill one of a kind in the cluster, drawn where there are several; return what it was, or None."""
    nodes = find_nodes(state)
    everything = [(name, *process) for name, processes in sorted(nodes.items()) for process in processes]
    victims = [victim for victim in everything if victim[2].startswith(subject.victims[kind])]
    if not victims:
        return None
    name, pid, title = rng.choice(victims)
    if kind == "node":
        kill_and_restart_node(state, name, [pid for pid, _ in nodes[name]])
    else:
        kill(pid)
    return f"{title[:60].strip()}, pid {pid} of {name}"


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_and_restart_node(state: Path, name: str, pids: list[int]) -> None:
    """Kill all processes of a node and start it again as `up.sh` did."""
    command = Path(f"/proc/{pids[0]}/cmdline").read_text().rstrip("\0").split("\0")
    variables = Path(f"/proc/{pids[0]}/environ").read_text().rstrip("\0").split("\0")
    kill(*pids)
    arguments = [str(PROJECT / "cluster/local/processes.sh"), str(state), name, *command]
    environment = dict(variable.split("=", 1) for variable in variables)
    subprocess.run(["bash", "-c", START_NODE, "start_node", *arguments], env=environment, check=True, timeout=30)


def soak(site: Site, subject: Subject) -> str:
    """Run a quiet round and the killed ones, keep the results, and return a line that sums them up."""
    started = time.monotonic()
    rounds: list[Round] = []
    quiet: dict[str, Any] = {}
    total = 0
    for number in range(subject.num_rounds + 1):
        row = Round(number=number)
        rounds.append(row)
        try:
            run_round(site, subject, row, total)
        finally:
            keep(subject, rounds, started)
        (artefact,) = (site.folder / f"runs/soak_{subject.step}/{subject.step}").iterdir()
        result = subject.read_result(artefact)
        row.repeats += count_attempts(artefact) - count_commits(artefact)
        if number == 0:
            total, quiet = subject.count_done(artefact), result
        differing = sorted(name for name in {*quiet, *result} if quiet.get(name) != result.get(name))
        is_dear = row.repeats > subject.max_repeats * len(row.kills)
        row.outcome = f"differs: {', '.join(differing)}" if differing else "repeats too much" if is_dear else "same"
        artefact.parent.rename(artefact.parent.with_name(f"{subject.step}-{number}"))
    return keep(subject, rounds, started)


def run_round(site: Site, subject: Subject, row: Round, total: int) -> None:
    """Submit the step until it is finished, killing by a drawn schedule; round 0 is quiet.

    What is done is counted all the time. Where the count falls, because training went back to a checkpoint, that much
    is done again; cleaning keeps a note of each attempt instead.
    """
    started = time.monotonic()
    rng = random.Random(f"{SEED} {subject.step} {row.number}")
    num_kills = subject.kills_a_round if row.number else 0
    due = sorted(round(rng.uniform(0.02, 0.85) * total) for _ in range(num_kills))
    kinds = rng.choices(list(subject.victims), k=num_kills)
    path = site.folder / f"soak-{subject.step}-{row.number}.log"
    artefacts = site.folder / f"runs/soak_{subject.step}/{subject.step}"
    last = 0
    while True:
        row.submissions += 1
        num_before = len(row.kills)
        with path.open("a") as log, submit(site, subject, log) as job:
            while job.poll() is None:
                done = max(map(subject.count_done, artefacts.glob("*")), default=0)
                if done < last:
                    time.sleep(POLL_S)  # until the file of metrics is written anew
                    done = max(map(subject.count_done, artefacts.glob("*")), default=0)
                row.repeats += max(0, last - done)
                last = done
                if len(row.kills) < num_kills and done >= due[len(row.kills)]:
                    time.sleep(rng.uniform(0, MAX_DELAY_S))
                    kind = kinds[len(row.kills)]
                    if (what := kill_one(site.folder / "cluster", subject, kind, rng)) is not None:
                        second = round(time.monotonic() - started, 1)
                        row.kills.append({"second": second, "done": f"{done}/{total}", "kind": kind, "what": what})
                time.sleep(POLL_S)
        row.seconds = round(time.monotonic() - started, 1)
        if job.returncode == 0:
            return
        is_killed = any(kill["kind"] == "driver" for kill in row.kills[num_before:])
        assert is_killed, f"the job failed, and its driver was not killed:\n{path.read_text()[-4000:]}"


@contextmanager
def submit(site: Site, subject: Subject, log: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Submit the step as a user does; the job is followed until its end or that of the block."""
    run_dir = f"--run_dir=runs/soak_{subject.step}"
    command = [str(BIN / "ray-ds"), "submit", subject.step, RECIPE, run_dir, *subject.overrides]
    job = subprocess.Popen(command, cwd=site.folder, env=site.environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def keep(subject: Subject, rounds: list[Round], started: float) -> str:
    """Write the results so far; return a line that sums them up."""
    kinds = Counter(kill["kind"] for row in rounds for kill in row.kills)
    outcomes = {row.outcome for row in rounds}
    outcome = "unfinished" if "unfinished" in outcomes else "passed" if outcomes == {"same"} else "failed"
    seconds = round(time.monotonic() - started)
    results = {
        "soak": subject.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "cpus": os.cpu_count(),
        "seconds": seconds,
        "outcome": outcome,
        "kills": kinds,
        "rounds": [asdict(row) for row in rounds],
    }
    path = SOAK_RESULTS / f"{subject.step}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    repeats = sum(row.repeats for row in rounds)
    return (
        f"soak {subject.step}: {outcome} after {len(rounds) - 1} rounds; killed {counts};"
        f" {repeats} {subject.unit} done again; {seconds} s; {path}"
    )


def manifest_files(artefact: Path) -> dict[str, Any]:
    """Return the sha256 of an artefact's files by path."""
    return {info["path"]: info["sha256"] for info in json.loads((artefact / "manifest.json").read_text())["files"]}


def count_commits(artefact: Path) -> int:
    return len(list(artefact.glob("work/*/commits/*.json")))


def count_attempts(artefact: Path) -> int:
    """Return how often a unit was begun; none are in a folder of training."""
    return len(list(artefact.glob("work/*/attempts/*.json")))


def count_steps(artefact: Path) -> int:
    """Return the steps in the metrics: while it trains those that count so far, and then all."""
    for name in ("work/metrics.jsonl", "metrics.jsonl"):  # the first is deleted once the second is there
        with suppress(FileNotFoundError):
            return (artefact / name).read_text().count("\n")
    return 0


def read_training(artefact: Path) -> dict[str, Any]:
    """Return every step's figures and the hashes of the model's files."""
    records = [json.loads(line) for line in (artefact / "metrics.jsonl").read_text().splitlines()]
    steps = {f"step {row[0]}": row for row in curve(records)}
    return {**steps, **{name: sha for name, sha in manifest_files(artefact).items() if name.startswith("model/")}}


CLEAN = Subject(
    step="clean",
    overrides=('--clean.inputs=[{glob = "soak_text/*.jsonl", source = "test", licence = "CC0-1.0"}]',),
    unit="units",
    victims={"worker": "ray::ReadWorkUnits", "node": "worker-", "driver": "python -m jobs.clean_text"},
    num_rounds=6,
    kills_a_round=3,
    count_done=count_commits,
    max_repeats=NUM_CPUS,
    read_result=manifest_files,
)
TRAIN = Subject(
    step="train",
    overrides=(f"--train.steps={STEPS}", f"--train.checkpoint_every={CHECKPOINT_EVERY}", "--train.log_every=1"),
    unit="steps",
    victims={"worker": "ray::RayTrainWorker", "node": "worker-", "driver": "python -m jobs.train_model"},
    num_rounds=5,
    kills_a_round=2,
    count_done=count_steps,
    max_repeats=CHECKPOINT_EVERY,
    read_result=read_training,
)


def run_and_check(site: Site, subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    """Soak, print the summary, and fail unless every round gave the same and every kind of kill was met."""
    summary = soak(site, subject)
    with capsys.disabled():
        print(f"\n{summary}")
    assert f" {subject.step}: passed " in summary
    assert all(f" {kind}" in summary for kind in subject.victims)


def test_cleaning(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "soak_text").mkdir()
    text = "".join(json.dumps(record) + "\n" for record in king_james_chapters())
    for copy in range(2):  # so that there are duplicates to find
        (site.folder / f"soak_text/{copy}.jsonl").write_text(text)
    run_and_check(site, CLEAN, capsys)


def test_training(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("clean", "tokenizer", "tokenize"):
        result = site.ray_ds("submit", step, RECIPE, "--run_dir=runs/soak_train")
        assert result.returncode == 0, result.stdout[-4000:]
    run_and_check(site, TRAIN, capsys)
