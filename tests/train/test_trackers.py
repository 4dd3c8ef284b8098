"""Trackers keep the figures of each step, go on with the same run, and never end training; the real packages."""

import math
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_ds.errors import ConfigError
from ray_ds.train import tracker_kinds, trackers
from ray_ds.train.tracker_kinds import TrackedRun
from ray_ds.train.trackers import Trackers, check_trackers

SETTINGS: dict[str, Any] = {"seq_len": 16, "optimizer": {"kind": "adamw", "lr": 0.01}}


def make_run(folder: Path, steps_done: int = 0) -> TrackedRun:
    return TrackedRun(output=str(folder / "pretrain" / "0123456789abcdef"), settings=SETTINGS, steps_done=steps_done)


def track(name: str, run: TrackedRun, steps: Sequence[int], factor: float = 1.0, *, is_finished: bool = True) -> None:
    """Track steps whose loss is factor / step."""
    tracked = Trackers([name], run)
    for step in steps:
        tracked.log({"step": step, "time": 1e9 + step, "loss": factor / step, "is_skipped": False})
    tracked.close(is_finished=is_finished)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """The log's events about trackers."""
    found: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(trackers, "log_event", lambda name, **fields: found.append((name, fields)))
    return found


def read_events(folder: Path) -> Iterator[Any]:
    """Yield TensorBoard's events: files in order, each a run of (length, crc, bytes, crc)."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event = Event()
            event.ParseFromString(data[12 : 12 + size])
            yield event
            data = data[16 + size :]


def shown_by_tensorboard(folder: Path) -> dict[int, float]:
    """Return the losses by step that TensorBoard shows: a session's start at a step hides what came before from it."""
    losses: dict[int, float] = {}
    for event in read_events(folder):
        if event.HasField("session_log"):
            losses = {step: loss for step, loss in losses.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "loss":
                losses[event.step] = value.simple_value
    return losses


def test_tensorboard_shows_steps_that_ran_again_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    track("tensorboard", run, range(1, 11), is_finished=False)
    time.sleep(1.1)  # its files' names hold whole seconds
    track("tensorboard", make_run(tmp_path, steps_done=6), range(7, 9), factor=2.0)
    folder = Path(run.output) / "tensorboard"
    assert shown_by_tensorboard(folder) == pytest.approx(
        {**{step: 1 / step for step in range(1, 7)}, 7: 2 / 7, 8: 2 / 8}
    )
    found = [(value.tag, event) for event in read_events(folder) for value in event.summary.value]
    assert all(event.wall_time == 1e9 + event.step for tag, event in found if tag == "loss")
    assert [tag for tag, _ in found].count("settings/text_summary") == 1


def test_tensorboard_follows_when_training_goes_back_without_a_restart(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    tracked = Trackers(["tensorboard"], run)
    for number, step in enumerate([1, 2, 3, 2]):
        if number == 3:
            time.sleep(1.1)
        tracked.log({"step": step, "loss": number})
    tracked.close(is_finished=True)
    assert shown_by_tensorboard(Path(run.output) / "tensorboard") == {1: 0.0, 2: 3.0}


def test_tensorboard_on_an_object_store_is_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_kinds.storage, "is_remote", lambda uri: True)  # the copy's target is a plain folder
    run = make_run(tmp_path)
    (Path(run.output) / "tensorboard").mkdir(parents=True)  # an object store needs no folders
    track("tensorboard", run, range(1, 4))
    assert shown_by_tensorboard(Path(run.output) / "tensorboard") == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})


def read_wandb(file: Path) -> list[Any]:
    """Return the records of an offline run: LevelDB's log format, a record split over blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, part, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or last of several
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(part)
            part = b""
    return found


def wait_for_wandb(file: Path) -> list[Any]:
    """Return the records once the last one is there: W&B's own process writes them, and is not waited for."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        records = read_wandb(file)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError("the run was never finished")


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    return tmp_path / "wandb"


def test_wandb_goes_on_with_the_run_of_the_digest(
    wandb_folder: Path, tmp_path: Path, events: list[tuple[str, dict[str, object]]]
) -> None:
    track("wandb", make_run(tmp_path), range(1, 5), is_finished=False)
    time.sleep(1.1)  # its folders' names hold whole seconds
    track("wandb", make_run(tmp_path, steps_done=3), range(4, 7))
    assert events == []
    attempts = [wait_for_wandb(file) for file in sorted(wandb_folder.glob("offline-run-*/run-*.wandb"))]
    runs = [record.run for attempt in attempts for record in attempt if record.HasField("run")]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {
        ("0123456789abcdef", "pretrain-01234567", "ray_ds")
    }
    steps = [_history(attempt, "step") for attempt in attempts]
    assert steps == [[1, 2, 3, 4], [4, 5, 6]]
    assert _history(attempts[0], "loss") == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [record.exit.exit_code for attempt in attempts for record in attempt if record.HasField("exit")] == [1, 0]
    axes = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for attempt in attempts
        for record in attempt
        if record.HasField("metric")
    }
    assert axes["*"] == "step"


def _history(records: list[Any], name: str) -> list[float]:
    """Return a figure's values, one a step."""
    items = [item for record in records if record.HasField("history") for item in record.history.item]
    return [float(item.value_json) for item in items if name in (item.key, *item.nested_key)]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    environment = {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    return MlflowClient()


def test_mlflow_goes_on_with_the_run_of_the_tag(tmp_path: Path, mlflow_client: Any) -> None:
    def find_runs() -> list[Any]:
        experiment = mlflow_client.get_experiment_by_name("ray_ds").experiment_id
        runs: list[Any] = mlflow_client.search_runs([experiment])
        return runs

    track("mlflow", make_run(tmp_path), range(1, 71), is_finished=False)
    assert [run.info.status for run in find_runs()] == ["KILLED"]
    track("mlflow", make_run(tmp_path, steps_done=60), range(61, 81))
    other = TrackedRun(output=str(tmp_path / "pretrain" / "other"), settings=SETTINGS, steps_done=0)
    track("mlflow", other, [1], factor=float("nan"))  # the loss of a skipped step
    runs = {run.data.tags["ray_ds.digest"]: run for run in find_runs()}
    assert set(runs) == {"0123456789abcdef", "other"} and math.isnan(runs["other"].data.metrics["loss"])
    run = runs["0123456789abcdef"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "pretrain-01234567")
    assert run.data.params == {"seq_len": "16", "optimizer.kind": "adamw", "optimizer.lr": "0.01"}
    history = mlflow_client.get_metric_history(run.info.run_id, "loss")
    assert {(metric.step, metric.value) for metric in history} == {(step, 1 / step) for step in range(1, 81)}
    assert len(history) == 90 and {metric.timestamp for metric in history if metric.step == 5} == {(10**9 + 5) * 1000}


class Flaky:
    """A tracker whose server is away for some calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.kept: list[int] = []
        self.is_finished: bool | None = None

    def log(self, records: Sequence[trackers.Record]) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("server away")
        self.kept += [int(record["step"]) for record in records]

    def close(self, *, is_finished: bool) -> None:
        self.is_finished = is_finished


def test_a_server_that_comes_back_gets_what_it_missed_and_is_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, dict[str, object]]]
) -> None:
    tracker = Flaky(failures=3)
    monkeypatch.setattr(trackers, "OPEN", {"wandb": lambda run: tracker})
    monkeypatch.setattr(trackers, "RETRY_S", 0.01)
    tracked = Trackers(["wandb"], make_run(tmp_path))
    for step in range(1, 6):
        tracked.log({"step": step})
        time.sleep(0.05)
    tracked.close(is_finished=False)
    assert tracker.kept == [1, 2, 3, 4, 5] and tracker.is_finished is False
    assert [name for name, _ in events] == ["tracker_failed", "tracker_recovered"]
    assert events[0][1] == {"tracker": "wandb", "error": "ConnectionError: server away"}


def test_a_dead_server_is_not_asked_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, dict[str, object]]]
) -> None:
    tracker = Flaky(failures=1000)
    monkeypatch.setattr(trackers, "OPEN", {"wandb": lambda run: tracker})
    tracked = Trackers(["wandb"], make_run(tmp_path))
    for step in range(1, 6):
        tracked.log({"step": step})
        time.sleep(0.02)
    tracked.close(is_finished=True)
    assert tracker.failures == 998  # at the first step, and at the end
    assert [name for name, _ in events] == ["tracker_failed", "tracker_left_behind"]
    assert events[1][1] == {"tracker": "wandb", "records": 5}


@pytest.mark.shows("TensorBoard, W&B and MLflow follow a run over restarts; a dead server never slows or ends training")
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_server_that_never_answers_stops_nothing(
    is_finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, dict[str, object]]]
) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(trackers, "OPEN", {"mlflow": lambda run: is_over.wait(60.0), "tensorboard": lambda run: 1 // 0})
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S" if is_finished else "BREAK_OFF_TIMEOUT_S", 0.2)
    tracked = Trackers(["mlflow", "tensorboard"], make_run(tmp_path))
    started = time.monotonic()
    for step in range(1, 1001):
        tracked.log({"step": step})
    assert time.monotonic() - started < 0.5
    tracked.close(is_finished=is_finished)
    assert time.monotonic() - started < 4.0
    is_over.set()
    assert ("tracker_left_behind", {"tracker": "mlflow", "records": 1000}) in events
    assert ("tracker_left_behind", {"tracker": "tensorboard", "records": 1000}) in events
    assert [fields["tracker"] for name, fields in events if name == "tracker_failed"] == ["tensorboard"]


def test_no_trackers_are_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    tracked = Trackers([], make_run(tmp_path))
    tracked.log({"step": 1})
    assert threading.active_count() == before
    tracked.close(is_finished=True)


def test_a_missing_package_is_refused_even_where_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name.split(".")[0] != "wandb"})
    message = r"^train\.trackers \(wandb\) must be installed where the workers run; pip install wandb, or remove it\.$"
    with pytest.raises(ConfigError, match=message):
        check_trackers(["wandb"], "train.trackers")


def test_places_that_would_not_last_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    check_trackers(["tensorboard", "wandb"], "train.trackers")
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI \(unset\) must name the tracking server: .*; set it"):
        check_trackers(["mlflow"], "train.trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match=r"^WANDB_DIR \(unset\) must name a folder .* out of train\.trackers\.$"):
        check_trackers(["wandb"], "train.trackers")
