"""Where the figures of each step also go, as the setting `trackers` says.

Rank 0 feeds each tracker from a thread of its own, so that a slow or dead server costs training nothing. A run that
goes on after a restart or in a new submission goes on there too.
"""

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Sequence

from ray_ds.errors import ConfigError
from ray_ds.logs import log_event
from ray_ds.train.metrics import Record
from ray_ds.train.tracker_kinds import OPEN, TrackedRun, Tracker

RETRY_S = 30.0
CLOSE_TIMEOUT_S = 60.0
"""How long the end of training waits for what trackers have not taken yet."""
BREAK_OFF_TIMEOUT_S = 5.0
"""The same where training is not finished: others wait to go on with it."""
KEPT_RECORDS = 100_000
"""Records that wait for a tracker which fails, the newest ones."""
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Trackers:
    """All places that keep a run's figures; errors of theirs are logged and never end training."""

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        """Start to feed the named trackers; no names, no threads."""
        self._feeds = [_Feed(name, run) for name in names]

    def log(self, record: Record) -> None:
        """Hand over a step's figures without waiting."""
        for feed in self._feeds:
            feed.put(record)

    def close(self, *, is_finished: bool) -> None:
        """Wait until all is kept, but not for ever."""
        deadline = time.monotonic() + (CLOSE_TIMEOUT_S if is_finished else BREAK_OFF_TIMEOUT_S)
        for feed in self._feeds:
            feed.end(is_finished)
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))


class _Feed:
    """A tracker, the records that wait for it, and the thread that tries until it takes them."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting: list[Record] = []
        self._tracker: Tracker | None = None
        self._has_ended = self._is_finished = False
        self._num_put = self._num_kept = 0
        self._next_try: float | None = None  # while the tracker fails
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        self._num_put += 1
        self._queue.put(record)

    def end(self, is_finished: bool) -> None:
        self._is_finished = is_finished
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._leave_behind()

    def _leave_behind(self) -> None:
        log_event("tracker_left_behind", tracker=self._name, records=self._num_put - self._num_kept)

    def _work(self) -> None:
        while not self._has_ended:
            self._take()
            self._hand_over()
        if self._waiting:
            self._leave_behind()
        if self._tracker is not None:
            try:
                self._tracker.close(is_finished=self._is_finished)
            except Exception as error:
                self._complain(error)

    def _take(self) -> None:
        """Move what arrives to what waits: from the first record all that is there, or all until the next try."""
        deadline = self._next_try
        while not self._has_ended:
            try:
                timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                record = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                break
            if record is None:
                self._has_ended = True
            else:
                self._waiting.append(record)
                deadline = deadline or time.monotonic()
        del self._waiting[:-KEPT_RECORDS]

    def _hand_over(self) -> None:
        """Give the tracker what waits; what it does not take goes on waiting."""
        if not self._waiting:
            return
        try:
            if self._tracker is None:
                self._tracker = OPEN[self._name](self._run)
            self._tracker.log(self._waiting)
        except Exception as error:  # whatever a tracker's package raises, training goes on
            self._complain(error)
            return
        self._num_kept += len(self._waiting)
        self._waiting = []
        if self._next_try is not None:
            self._next_try = None
            log_event("tracker_recovered", tracker=self._name)

    def _complain(self, error: Exception) -> None:
        """Log the first error of a row."""
        if self._next_try is None:
            log_event("tracker_failed", tracker=self._name, error=f"{type(error).__name__}: {error}")
        self._next_try = time.monotonic() + RETRY_S


def check_trackers(names: Sequence[str], field: str) -> None:
    """Refuse trackers that this process could not use; for the driver, and again on rank 0.

    Raises:
        ConfigError: a package is missing, or a variable of the environment.
    """
    for name in names:
        found = importlib.util.find_spec(PACKAGES[name])
        if found is None or found.origin is None:  # without an origin it is only a folder of that name
            package = "mlflow-skinny" if name == "mlflow" else PACKAGES[name]
            allowed, action = "must be installed where the workers run", f"pip install {package}, or remove it"
            raise ConfigError(field, name, allowed, action)
    advice = f"set it in the environment of the nodes or of the job, or take {{}} out of {field}"
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        allowed = "must name the tracking server: a worker's own folder is not kept"
        raise ConfigError("MLFLOW_TRACKING_URI", "unset", allowed, advice.format("mlflow"))
    is_offline = os.environ.get("WANDB_MODE") == "offline"
    if "wandb" in names and is_offline and not os.environ.get("WANDB_DIR"):
        allowed = "must name a folder that lasts while WANDB_MODE is offline: a worker's own is not kept"
        raise ConfigError("WANDB_DIR", "unset", allowed, advice.format("wandb"))
