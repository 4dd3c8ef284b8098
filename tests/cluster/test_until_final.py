"""`ray-ds-until-final`, which a RayJob runs its command by: what is tried again and what is not."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ray_ds.errors import RETRYABLE_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.cluster.cluster_files import CLUSTER

SCRIPT = str(CLUSTER / "image" / "ray-ds-until-final")


def command(tmp_path: Path, *statuses: int) -> list[str]:
    """Return a command that ends with one status after another, and notes each of its runs in `runs`."""
    runs = f"{tmp_path}/runs"
    script = f'echo run >>"{runs}"; set -- {" ".join(map(str, statuses))}; shift $(($(wc -l <"{runs}") - 1)); exit $1'
    return ["bash", "-c", script]


def runs(tmp_path: Path) -> int:
    """Return how often the command ran."""
    return len((tmp_path / "runs").read_text().splitlines())


@pytest.mark.parametrize(
    ("statuses", "status", "times"),
    [
        ((0,), 0, 1),
        ((1,), 1, 1),
        ((USER_ERROR_EXIT_CODE,), USER_ERROR_EXIT_CODE, 1),
        ((RETRYABLE_EXIT_CODE, 0), 0, 2),
        ((RETRYABLE_EXIT_CODE, USER_ERROR_EXIT_CODE), USER_ERROR_EXIT_CODE, 2),
        ((137, RETRYABLE_EXIT_CODE, 139, 0), 139, 3),
    ],
)
def test_what_is_tried_again(tmp_path: Path, statuses: tuple[int, ...], status: int, times: int) -> None:
    environment = {**os.environ, "RAY_DS_RETRY_PAUSE_S": "0"}
    result = subprocess.run([SCRIPT, "3", *command(tmp_path, *statuses)], env=environment, capture_output=True)
    assert (result.returncode, runs(tmp_path)) == (status, times)


def test_a_stop_is_no_failure_to_mend(tmp_path: Path) -> None:
    worker = ["bash", "-c", f'trap "exit 75" TERM; echo run >>"{tmp_path}/runs"; sleep 30 & wait; exit 1']
    environment = {**os.environ, "RAY_DS_RETRY_PAUSE_S": "0"}
    process = subprocess.Popen([SCRIPT, "3", *worker], env=environment, start_new_session=True)
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as `ray job stop` does: the script and what it runs
    assert process.wait(10) == RETRYABLE_EXIT_CODE
    assert runs(tmp_path) == 1


def test_its_use_is_told() -> None:
    result = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert result.returncode != 0 and "usage: ray-ds-until-final ATTEMPTS COMMAND..." in result.stderr
