import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ds.train import stacks
from ray_ds.train.stacks import kill_process, start_time, view_process

PROGRAM = """
import sys, time
from ray_ds.train.stacks import offer_stacks
def waits_for_ever():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
if sys.argv[1] == "offers":
    offer_stacks()
waits_for_ever()
"""


def start(argument: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, argument], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def offering() -> Iterator[subprocess.Popen[str]]:
    """Return a process that hangs and has offered its stack traces."""
    process = start("offers")
    yield process
    process.kill()
    process.wait()
    stacks._stack_file(process.pid).unlink(missing_ok=True)


def test_traces_name_the_function_a_process_is_in(offering: subprocess.Popen[str]) -> None:
    view = view_process(offering.pid)
    assert not view.is_stopped
    assert f"process {offering.pid}: {view.state}" in view.text
    assert "waits_for_ever" in view.text


def test_traces_of_a_stopped_process_name_its_function_and_leave_it_stopped(offering: subprocess.Popen[str]) -> None:
    os.kill(offering.pid, signal.SIGSTOP)
    while not (view := view_process(offering.pid)).is_stopped:
        time.sleep(0.01)
    assert view.state == "T (stopped)"
    assert "waits_for_ever" in view.text
    assert view_process(offering.pid).is_stopped


def test_process_writes_its_traces_itself_where_py_spy_cannot(
    offering: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_spy", lambda *_: ("", "Permission denied"))
    for _ in range(2):
        text = view_process(offering.pid).text
        assert text.count("waits_for_ever") == 1
        assert "no stack traces" not in text
    assert offering.poll() is None


def test_process_that_offered_nothing_is_not_ended_by_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_spy", lambda *_: ("", "Permission denied"))
    process = start("offers nothing")
    try:
        stacks._stack_file(process.pid).touch()  # a leftover of another process with this pid
        text = view_process(process.pid).text
        assert "no stack traces: Permission denied, and the process answers no signal" in text
        assert process.poll() is None
    finally:
        stacks._stack_file(process.pid).unlink()
        process.kill()
        process.wait()


def test_py_spy_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no stack traces: py-spy is not installed" in view_process(os.getpid()).text


def test_process_that_is_gone_has_no_state() -> None:
    process = start("offers nothing")
    process.kill()
    process.wait()
    view = view_process(process.pid)
    assert (view.state, view.text, view.is_stopped) == ("", f"process {process.pid}: is gone\n", True)
    assert start_time(process.pid) is None


def test_only_the_process_that_is_meant_is_killed_though_it_is_stopped(offering: subprocess.Popen[str]) -> None:
    started = start_time(offering.pid)
    assert started is not None
    os.kill(offering.pid, signal.SIGSTOP)
    assert not kill_process(offering.pid, started - 1)
    assert offering.poll() is None
    assert kill_process(offering.pid, started)
    assert offering.wait(timeout=10) == -signal.SIGKILL
    assert not stacks._stack_file(offering.pid).exists()
    assert not kill_process(offering.pid, started)
