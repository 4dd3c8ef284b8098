"""What SIGTERM does to a job: `ray job stop` sends it, waits, and only then kills."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ray_ds.errors import RetryableError


def end_on_sigterm() -> None:
    """Make SIGTERM end this process's work where it stands; call it after Ray, which brings a handler of its own.

    What is committed stays, and the next submission goes on from there.
    """
    signal.signal(signal.SIGTERM, _raise_stopped)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Make the first SIGTERM set an event instead, for work that wants to come to a good end; a second one ends it."""
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            _raise_stopped(number, frame)
        event.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_stopped(number: int, _: FrameType | None) -> None:
    raise RetryableError(f"the job was told to stop ({signal.Signals(number).name}); submit it again to go on")
