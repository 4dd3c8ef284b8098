"""What submitting a step checks and shows, without a cluster."""

import shlex
from pathlib import Path

import pytest

from ray_ds import submit
from ray_ds.errors import ClusterError, ConfigError
from ray_ds.recipe import load_recipe
from ray_ds.submit import JobRequest, check_overrides, job_client, submit_step

PROJECT = Path(__file__).parent.parent


class FakeClient:
    """Takes a job and keeps what it was given."""

    def submit_job(self, **job: object) -> str:
        self.job = job
        return "job-1"


def request(overrides: tuple[str, ...] = ()) -> JobRequest:
    return JobRequest(recipe_path="jobs/recipes/demo.toml", root="/data", overrides=overrides)


def test_the_job_is_the_stages_module_with_absolute_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    recipe = load_recipe("jobs/recipes/demo.toml", root="/data")
    client = FakeClient()
    override = """--clean.inputs=[{glob = "/a b/*.txt", source = "it's", licence = "x"}]"""
    assert submit_step(client, recipe.step("clean"), request((override,))) == "job-1"
    words = shlex.split(str(client.job["entrypoint"]))
    assert words[:3] == ["python", "-m", "jobs.clean_text"]
    assert words[3:] == ["--recipe", "jobs/recipes/demo.toml", "--root", "/data", "--step", "clean", override]
    assert client.job["runtime_env"] == {"working_dir": str(PROJECT)}


def test_a_folder_without_jobs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = load_recipe(str(PROJECT / "jobs/recipes/demo.toml"), root="/data").step("clean")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^working directory \(.*\) must hold jobs/, which is shipped.*; cd there"):
        submit_step(FakeClient(), step, request())


def test_a_recipe_that_would_not_travel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(PROJECT)
    step = load_recipe("jobs/recipes/demo.toml", root="/data").step("clean")
    elsewhere = JobRequest(recipe_path=str(tmp_path / "r.toml"), root="/data", overrides=())
    with pytest.raises(ConfigError, match=r"^recipe \(.*r.toml\) must lie below jobs/, which is shipped"):
        submit_step(FakeClient(), step, elsewhere)


def test_no_cluster_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"^RAY_API_SERVER_ADDRESS \(http://127.0.0.1:1\) must be a Ray dashboard"):
        job_client()


def test_arguments_that_are_no_overrides_are_refused() -> None:
    assert check_overrides(["--a.b=1"]) == ("--a.b=1",)
    with pytest.raises(ConfigError, match=r"^argument \(extra\) must be an override like --step.field=value"):
        check_overrides(["extra"])


def test_a_job_log_shows_lines_and_a_terminal_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "start\n12:00:00 progress step=train done=1 total=4 loss=2.5\n12:00:01 progress step=train done=4 total=4\nend"
    )
    lines = submit._LogPrinter(is_terminal=False)
    lines.feed(text[:20])
    lines.feed(text[20:])
    lines.close()
    assert capsys.readouterr().out == text + "\n"
    bar = submit._LogPrinter(is_terminal=True)
    bar.feed(text)
    bar.close()
    shown = capsys.readouterr()
    assert "progress" not in shown.out and "start" in shown.out and "end" in shown.out
    assert "train" in shown.err and "4/4" in shown.err
    assert shown.err.count("\n") == 1  # one bar, whatever it is told


def test_a_bar_begins_where_a_job_goes_on_and_moves_back_after_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    bar = submit._LogPrinter(is_terminal=True)
    bar.feed("progress step=train done=500 total=1000 loss=2.5\n")
    assert bar._bar.initial == 500 and "500/1000" in capsys.readouterr().err
    bar.feed("progress step=train done=600 total=1000 loss=2.25 restarts=0\n")
    assert "600/1000" in capsys.readouterr().err
    bar.feed("progress step=train done=510 total=1000 loss=2.5 restarts=1\n")
    shown = capsys.readouterr()
    assert shown.out == "train went back from 600 to 510 of 1000\n"
    assert "510/1000" in shown.err and "restarts 1" in shown.err
    bar.feed("progress step=train done=511 total=1000 loss=2.5 restarts=1\n")
    assert "511/1000" in capsys.readouterr().err
    bar.close()


def test_a_bar_words_the_figures_of_training_and_leaves_others_as_they_are() -> None:
    fields = "loss=2.34567 validation_loss=2.5 tokens_per_s=1.2346e+05 mfu=0.412 goodput=0.98 world_size=2 restarts=1"
    words = "loss 2.346, validation 2.5, 123,460 tokens/s, 41% MFU, 98% goodput, workers 2, restarts 1"
    assert submit._words(f"{fields} lr=0.001 grad_norm=1") == words
    assert submit._words('documents=12 last="a b" kept=0.5') == 'documents=12, last="a b", kept=0.5'
    assert submit._words("") == ""
