"""`ray-ds` and what jobs call: exit statuses and one-line errors."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ds import cli, job
from ray_ds.errors import ConfigError, RayDsError

PROJECT = Path(__file__).parent.parent
DEMO = str(PROJECT / "jobs/recipes/demo.toml")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wash"], "arguments (argument COMMAND: invalid choice: 'wash'"),
        (["show", "/absent.toml"], "recipe (/absent.toml) must be a TOML file"),
        (["show", DEMO, "--pretrain.zero_stage=4"], "pretrain.zero_stage (4) must be 0, 1, 2 or 3"),
        (
            ["show", DEMO, "--pretrain.batch_tokens=5000"],
            "batch_tokens (5000) must be a multiple of micro_batch * seq_len",
        ),
        (["show", DEMO, "--pretrain.model.preset=huge"], "preset"),
        (
            ["evaluate", DEMO],
            "steps of stage evaluate (evaluate, evaluate_int8) must be exactly one; name one with --step",
        ),
        (["clean", DEMO, "--step=serve"], "--step (serve) must be a step of stage clean"),
        (["trace", "nowhere"], "nowhere (no manifest) must be a finished"),
        (["trace", "x", "--deep"], "arguments (--deep) must fit the usage"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and "Traceback" not in error


def test_other_failures_exit_with_1() -> None:
    def fail() -> int:
        raise RayDsError("lost")

    assert job.exit_status(fail) == 1


def test_a_users_mistake_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ConfigError("field", 3, "must be 4", "raise it")

    assert job.exit_status(fail) == 2
    assert capsys.readouterr().err == "error: field (3) must be 4; raise it.\n"


def test_show_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", DEMO) == 0
    assert "vocab_size = 4096" in capsys.readouterr().out
    assert run("--version") == 0


@pytest.mark.parametrize("name", ["clean_text", "run_recipe"])
def test_a_job_refuses_relative_paths_with_2(name: str) -> None:
    command = [sys.executable, "-m", f"jobs.{name}", "--recipe", DEMO]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "run_dir (runs/demo) must be absolute" in result.stderr and "Traceback" not in result.stderr


def test_a_step_that_another_job_finished_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_stage(*_: Any) -> None:
        raise AssertionError("the stage ran")

    def load(name: str) -> Any:
        known = {"ray_ds.on_ray.run_lock:lock_run": nullcontext, "the stage": run_stage}
        return known.get(name, lambda: None)

    found = iter([None, SimpleNamespace(uri="/runs/clean/0123")])  # before the lock is taken, and after
    monkeypatch.setattr(job, "find_finished", lambda *_: next(found))
    monkeypatch.setattr(job, "prepare_run", lambda *_: SimpleNamespace(uri="/runs/clean/0123"))
    monkeypatch.setattr(job, "load_object", load)
    step: Any = SimpleNamespace(name="clean", stage=SimpleNamespace(function="the stage"))
    recipe: Any = SimpleNamespace()
    job.run_step(recipe, step)
    assert next(found, None) is None, "it was looked for twice"
