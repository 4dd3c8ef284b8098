"""Log lines of the form `event key=value ...`, and progress that reads well in a job log and in a terminal."""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence

PROGRESS_EVENT = "progress"
_PROGRESS = re.compile(rf"^{PROGRESS_EVENT} step=(\S+) done=(\d+) total=(\d+)(?: (.*))?$")


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to standard output, a line an event, with the time in front."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("ray_ds")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def log_event(name: str, /, **fields: object) -> None:
    """Write one line: the event's name, then its fields as key=value."""
    logging.getLogger("ray_ds").info(format_event(name, **fields))


def format_event(name: str, /, **fields: object) -> str:
    """Return `name key=value ...`; values with spaces are quoted as JSON, floats have five significant digits."""
    return " ".join([name, *(f"{key}={_format_value(value)}" for key, value in fields.items())])


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns aligned on the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def log_table(rows: Sequence[Sequence[str]]) -> None:
    """Write a table, a line a row."""
    for line in table_lines(rows):
        logging.getLogger("ray_ds").info(line)


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"=]', text) or not text else text


class Progress:
    """Reports how far a step has come as `progress` lines, at most one every `interval_s` seconds.

    A job's log shows the lines; `ray-ds` turns them into a bar where it runs in a terminal.
    """

    def __init__(self, step: str, total: int, *, interval_s: float = 5.0) -> None:
        self.step = step
        self.total = total
        self._interval_s = interval_s
        self._last = float("-inf")

    def update(self, done: int, **fields: object) -> None:
        """Say that `done` of the total are done, with a few figures worth seeing."""
        now = time.monotonic()
        if done < self.total and now - self._last < self._interval_s:
            return
        self._last = now
        log_event(PROGRESS_EVENT, step=self.step, done=done, total=self.total, **fields)


def parse_progress(line: str) -> tuple[str, int, int, str] | None:
    """Return (step, done, total, further fields) of a `progress` line with or without its time, else None."""
    found = _PROGRESS.match(re.sub(r"^\d\d:\d\d:\d\d ", "", line.strip()))
    if found is None:
        return None
    return found[1], int(found[2]), int(found[3]), found[4] or ""
