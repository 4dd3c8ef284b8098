"""`ray job stop` on a training job: it leaves a checkpoint, says that it can go on, and does when submitted again."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, Site

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 150
OVERRIDES = (f"--train.steps={STEPS}", "--train.checkpoint_every=1000", "--train.log_every=1")
"""No regular checkpoint is due before the last step: the one that is found was written because of the stop."""


@pytest.mark.shows("`ray job stop` leaves a checkpoint; the job ends with status 75 and goes on when submitted again")
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on(
    site: Site, finished: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    before = {path.name for path in (site.folder / "runs/mini/train").iterdir()}
    command = [str(BIN / "ray-ds"), "submit", "train", "jobs/recipes/mini.toml", *OVERRIDES]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=site.folder, env=site.environment, stdout=out, stderr=subprocess.STDOUT) as job,
    ):
        folder = wait_for_steps(site.folder / "runs/mini/train", before, job, at_least=10)
        (job_id,) = set(re.findall(r"submitted step=train job=(\S+)", log.read_text()))
        stopped = site.run(str(BIN / "ray"), "job", "stop", job_id)
        assert stopped.returncode == 0, stopped.stderr
        assert job.wait(60) == 75, log.read_text()[-3000:]
    (checkpoint,) = (folder / "work/checkpoints").glob("step-*/COMMITTED.json")
    step = int(checkpoint.parent.name.removeprefix("step-"))
    assert 10 <= step < STEPS
    again = site.ray_ds("submit", "train", "jobs/recipes/mini.toml", *OVERRIDES)
    assert again.returncode == 0, again.stdout[-3000:]
    assert f" step={step + 1}\n" in "".join(
        line for line in again.stdout.splitlines(keepends=True) if "stepping" in line
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))


def wait_for_steps(runs: Path, before: set[str], job: subprocess.Popen[bytes], *, at_least: int) -> Path:
    """Wait until a new run has done some steps; return its folder."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None:
        for folder in runs.iterdir():
            live = folder / "work/metrics.jsonl"
            if folder.name not in before and live.exists() and live.read_text().count("\n") >= at_least:
                return folder
        time.sleep(0.05)
    raise AssertionError(f"the job did not come to step {at_least}; exit status {job.poll()}")
