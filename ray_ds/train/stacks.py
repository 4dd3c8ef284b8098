"""What a process is doing, seen from outside: its stack traces and what the kernel says, also where it is stopped."""

import ctypes
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PY_SPY_TIMEOUT_S = 10.0
SIGNAL_TIMEOUT_S = 2.0
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessView:
    """A process at a moment."""

    pid: int
    state: str
    """The kernel's letter and word, such as `S (sleeping)` or `T (stopped)`; empty where there is no such process."""
    text: str
    """The state and the stack traces, to read."""

    @property
    def is_stopped(self) -> bool:
        """Whether it cannot run, by a signal or because it is dead and nobody has taken notice."""
        return self.state[:1] in ("T", "t", "Z", "X", "")


def offer_stacks() -> None:
    """Let other processes of this user see this one's stack traces.

    With yama's `ptrace_scope = 1` a process must allow it. Where even that is not enough (a container without
    CAP_SYS_PTRACE, py-spy not installed) it writes them itself, on SIGUSR1, as long as it is not stopped.
    """
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    path = _stack_file(os.getpid())
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR1, file=handle, all_threads=True)


def view_process(pid: int) -> ProcessView:
    """Return a process's state and stack traces; takes a moment, and at most `PY_SPY_TIMEOUT_S` and a little."""
    status = _status(pid)
    state = status.get("State", "")
    lines = [f"process {pid}: {state or 'is gone'}"]
    if state:
        waits_in = _read(Path(f"/proc/{pid}/wchan")).strip()
        kernel = _read(Path(f"/proc/{pid}/stack")).strip()
        lines += [f"waits in the kernel's {waits_in}"] if waits_in.strip("0") else []
        lines += [f"kernel stack:\n{kernel}"] if kernel else []
        lines.append(_traces(pid, status))
    return ProcessView(pid=pid, state=state, text="\n".join(lines) + "\n")


def start_time(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine started: with the pid it names one process for good.

    None where there is no such process.
    """
    stat = _read(Path(f"/proc/{pid}/stat"))
    # The name in parentheses may hold anything; the start time is field 22 of `man 5 proc_pid_stat`.
    return int(stat.rpartition(")")[2].split()[19]) if stat else None


def kill_process(pid: int, started: int) -> bool:
    """Kill the process with this pid and start time, also a stopped one; tell whether it was still there."""
    if start_time(pid) != started:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    _stack_file(pid).unlink(missing_ok=True)
    return True


def _traces(pid: int, status: dict[str, str]) -> str:
    """Return the stack traces of a process's threads, by py-spy or else by the process itself."""
    is_stopped = status["State"][:1] in ("T", "t")
    # py-spy stops the process while it looks, which fails where it is stopped already.
    found, error = _spy(pid, "--nonblocking" if is_stopped else "")
    if not found and not is_stopped:
        found, error = _spy(pid, "--nonblocking")
    if found:
        return found
    own = _ask_for_traces(pid, status)
    return own or f"no stack traces: {error}, and the process answers no signal"


def _spy(pid: int, option: str) -> tuple[str, str]:
    """Return what py-spy prints, or else why it prints nothing."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "py-spy is not installed"
    command = [program, "dump", "--pid", str(pid), *([option] if option else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", "py-spy took too long"
    if done.returncode or "Thread" not in done.stdout:
        return "", " ".join(done.stderr.split()[:30]) or "py-spy found no thread"
    return done.stdout.strip(), ""


def _ask_for_traces(pid: int, status: dict[str, str]) -> str:
    """Return what the process writes on SIGUSR1; nothing where it did not `offer_stacks`, for it would die of that."""
    catches = int(status.get("SigCgt", "0"), 16) >> (signal.SIGUSR1 - 1) & 1
    path = _stack_file(pid)
    if not catches or not path.exists():
        return ""
    before = path.stat().st_size
    os.kill(pid, signal.SIGUSR1)
    size, deadline = before, time.monotonic() + SIGNAL_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        last, size = size, path.stat().st_size
        if before < last == size:  # it has stopped growing
            break
    return path.read_bytes()[before:].decode(errors="replace").strip()


def _stack_file(pid: int) -> Path:
    """Return where a process writes its own stack traces."""
    return Path(tempfile.gettempdir()) / f"ray_ds-stacks-{os.getuid()}-{pid}.txt"


def _status(pid: int) -> dict[str, str]:
    """Return the lines of /proc/PID/status; empty where there is no such process."""
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _read(path: Path) -> str:
    """Return a file of /proc; empty where there is none or it is not for us."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
