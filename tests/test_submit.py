"""What submitting a step checks and shows, without a cluster."""

import logging
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus
from ray.util.state.exception import RayStateApiException

from ray_ds import submit
from ray_ds.errors import ClusterError, ConfigError, RetryableError
from ray_ds.recipe import load_recipe
from ray_ds.submit import JobEnd, JobRequest, check_overrides, job_client, submit_step

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


@pytest.mark.parametrize(("given", "expected"), [(None, "60"), ("600", "600")])
def test_a_job_has_a_minute_to_stop_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", given)
    client = FakeClient()
    submit_step(client, load_recipe("jobs/recipes/demo.toml", root="/data").step("clean"), request())
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": expected, "RAY_ENABLE_AUTO_CONNECT": "0"}
    assert client.job["runtime_env"] == {"working_dir": str(PROJECT), "env_vars": variables}


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


@dataclass
class Info:
    """What the cluster says of a job."""

    status: JobStatus
    driver_exit_code: int | None = None
    driver_node_id: str | None = None


@dataclass
class Node:
    """What the cluster says of a node."""

    state: str


@pytest.mark.parametrize(
    ("info", "exit_status", "is_stopped"),
    [
        (Info(JobStatus.SUCCEEDED, 0), 0, False),
        (Info(JobStatus.FAILED, 1), 1, False),
        (Info(JobStatus.FAILED, 2), 2, False),
        (Info(JobStatus.FAILED, 75), 75, False),
        (Info(JobStatus.FAILED, -9), 75, False),  # killed
        (Info(JobStatus.FAILED, 137), 75, False),  # killed below a shell
        (Info(JobStatus.FAILED), 75, False),  # lost with its node
        (Info(JobStatus.STOPPED), 75, True),
    ],
)
def test_exit_status_tells_finished_retryable_and_fatal(info: Info, exit_status: int, is_stopped: bool) -> None:
    client = FollowedClient([info])
    assert submit.follow_job(client, "job-1") == JobEnd(exit_status=exit_status, is_stopped=is_stopped)


class FollowedClient:
    """Answers with one thing after the other; what is an exception it raises."""

    def __init__(self, answers: list[Info | Exception], logs: list[list[str]] | None = None) -> None:
        self.answers, self.logs = answers, logs or []

    def get_job_info(self, _: str) -> Info:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_address(self) -> str:
        return "http://head"

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for text in self.logs.pop(0) if self.logs else ():
            if text == "broken":
                raise ConnectionError("the head is gone")
            yield text


def test_a_head_that_comes_back_is_followed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0.01)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    monkeypatch.setattr(submit, "END_WAIT_S", 0.02)
    gone = ConnectionError("refused")
    running, done = Info(JobStatus.RUNNING), Info(JobStatus.SUCCEEDED, 0)
    client = FollowedClient([gone, gone, *[running] * 10, done], [["one\n", "broken"], ["one\ntwo\n"]])
    assert submit.follow_job(client, "job-1").exit_status == 0
    assert "two" in capsys.readouterr().out


@pytest.mark.parametrize("nodes", [{"n1": Node("DEAD")}, {}])
def test_a_job_that_ray_takes_for_running_is_lost_with_its_node(
    nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(submit, "END_WAIT_S", 0.01)
    monkeypatch.setattr(submit, "get_node", lambda node, address: nodes.get(node))
    client = FollowedClient([Info(JobStatus.RUNNING, driver_node_id="n1")])
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        assert submit.follow_job(client, "job-1") == JobEnd(exit_status=75, is_stopped=False)
    assert caplog.messages == ["driver_lost job=job-1 node=n1"]


def test_a_job_is_not_lost_while_its_node_lives_or_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Node("ALIVE"), RayStateApiException("busy"), ConnectionError("refused")]

    def get_node(node: str, address: str) -> Node:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(submit, "get_node", get_node)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    monkeypatch.setattr(submit, "END_WAIT_S", 0.005)
    running = Info(JobStatus.RUNNING, driver_node_id="n1")
    client = FollowedClient([*[running] * 3, Info(JobStatus.SUCCEEDED, 0)])
    assert submit.follow_job(client, "job-1").exit_status == 0
    assert answers == []


def test_a_cluster_that_stays_silent_is_retryable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE_S", 0.0)
    with pytest.raises(
        RetryableError, match=r"the cluster has not answered for 0 s \(refused\); job job-1 may go on: see"
    ):
        submit.follow_job(FollowedClient([ConnectionError("refused")]), "job-1")
