"""Run work units on Ray Data, each with one commit, so that killed work resumes and finished work is not redone.

A unit is one read task of a Ray Data source: it reads, works, writes its files and then commits by writing one small
JSON file. File names and bytes follow from the unit's input and the stage's settings, so an attempt that was thought
dead writes the same bytes again, which does no harm. A unit is done when its commit is there and its files are.
"""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pydantic
import ray
from pydantic import JsonValue
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.logs import Progress
from ray_ds.on_ray.user_errors import user_errors

T = TypeVar("T")

Publish = Callable[[str, bytes], None]
"""Writes a file of a unit: (path below the root folder, its bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit(Generic[T]):
    """A piece of work that is done once."""

    name: str
    """Sorts in the order in which results are returned."""
    input_hash: str
    """Of all that the unit reads."""
    payload: T
    """What the work function is given; it travels to the task."""

    @property
    def commit_name(self) -> str:
        """Return the name of the file that says the unit is done."""
        return f"{self.name}-{self.input_hash}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The proof that a unit is done."""

    unit: str
    input_hash: str
    files: tuple[FileInfo, ...]
    facts: dict[str, JsonValue]
    """What the work function returned."""


_COMMIT = pydantic.TypeAdapter(Commit)


def run_units(
    units: Sequence[WorkUnit[T]],
    work: Callable[[T, Publish], dict[str, JsonValue]],
    *,
    root: str,
    folder: str,
    step: str,
    max_running: int | None = None,
    gpus_per_unit: float = 0.0,
) -> list[Commit]:
    """Do the units that are not done yet, on all nodes, and return the commits of all in order.

    Args:
        work: from a unit's payload to its facts; it must be a function of its input, and repeatable. It writes files
            only through the function it is given.
        root: the artefact's folder, which every node can write.
        folder: where below the root commits and the log of attempts lie.
        step: names the progress lines.
        max_running: units at a time; None for as many as the cluster holds at one CPU, and `gpus_per_unit`, each.
    Raises:
        UserError: `work` raised it.
    """
    commits = find_commits(units, root=root, folder=folder)
    missing = [unit for unit in units if unit.name not in commits]
    progress = Progress(step, len(units))
    progress.update(len(commits), resumed=len(commits))
    if missing:
        source = _UnitSource(missing, partial(_run_unit, work=work, root=root, folder=folder))
        for commit in _execute(source, max_running, gpus_per_unit):
            commits[commit.unit] = commit
            progress.update(len(commits))
    return [commits[unit.name] for unit in units]


def find_commits(units: Iterable[WorkUnit[T]], *, root: str, folder: str) -> dict[str, Commit]:
    """Return the valid commits by name of unit: for the same input, with all files there in full."""
    present = {entry.path: entry.bytes for entry in storage.list_files(root)}
    found: dict[str, Commit] = {}
    for unit in units:
        path = f"{folder}/commits/{unit.commit_name}"
        commit = _read_commit(storage.join(root, path)) if path in present else None
        if commit is not None and all(present.get(info.path) == info.bytes for info in commit.files):
            found[unit.name] = commit
    return found


def _read_commit(uri: str) -> Commit | None:
    """Return a commit; None when it is damaged, so that the unit is done again."""
    try:
        return _COMMIT.validate_json(storage.read_bytes(uri))
    except pydantic.ValidationError:
        return None


def _run_unit(
    unit: WorkUnit[T], *, work: Callable[[T, Publish], dict[str, JsonValue]], root: str, folder: str
) -> Iterator[pa.Table]:
    """Do a unit in a task; yield its commit as a table of one row.

    Ray runs a task again when its node died after the commit; then the commit alone is read.
    """
    commit_uri = storage.join(root, folder, "commits", unit.commit_name)
    done = _read_commit(commit_uri) if storage.exists(commit_uri) else None
    if done is None or not all(_size(storage.join(root, info.path)) == info.bytes for info in done.files):
        _log_attempt(unit, root=root, folder=folder)
        files: list[FileInfo] = []
        facts = work(unit.payload, partial(_publish, root=root, files=files))
        done = Commit(unit=unit.name, input_hash=unit.input_hash, files=tuple(files), facts=facts)
        data = json.dumps(asdict(done), sort_keys=True, ensure_ascii=False).encode()
        storage.write_bytes(commit_uri, data)
    yield pa.table({"commit": pa.array([_COMMIT.dump_json(done)], type=pa.binary())})


def _size(uri: str) -> int | None:
    """Return the size of a file; None where there is none."""
    system, path = storage.filesystem(uri)
    size: int | None = system.get_file_info(path).size
    return size


def _publish(path: str, data: bytes, *, root: str, files: list[FileInfo]) -> None:
    storage.write_bytes(storage.join(root, path), data)
    files.append(FileInfo(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def _log_attempt(unit: WorkUnit[Any], *, root: str, folder: str) -> None:
    """Leave a note that a unit was begun, where and when: who looks for lost time finds it here."""
    note = {
        "unit": unit.name,
        "host": socket.gethostname(),
        "node_id": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    name = f"{unit.name}-{secrets.token_hex(6)}.json"
    storage.write_bytes(storage.join(root, folder, "attempts", name), json.dumps(note).encode())


class _UnitSource(Datasource):  # type: ignore[misc]  # ray is not typed
    """A Ray Data source with one read task a unit."""

    def __init__(self, units: Sequence[WorkUnit[T]], run: Callable[[WorkUnit[T]], Iterator[pa.Table]]) -> None:
        super().__init__()
        self.units = units
        self.run = run

    def get_name(self) -> str:
        """Return the name that Ray shows."""
        return "WorkUnits"

    def estimate_inmemory_data_size(self) -> int:
        """Return the size of what the tasks return, which is next to nothing."""
        return 0

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Return a task for each unit, whatever parallelism Ray asks for."""
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self.run, unit), metadata) for unit in self.units]


def _execute(source: _UnitSource, max_running: int | None, gpus_per_unit: float) -> Iterator[Commit]:
    """Yield commits as tasks finish. Ray Data repeats tasks whose worker or node died, without limit."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=len(source.units),
        concurrency=max_running,
        num_cpus=1,
        num_gpus=gpus_per_unit or None,
    )
    with user_errors():
        for row in dataset.iter_rows():
            yield _COMMIT.validate_json(row["commit"])
