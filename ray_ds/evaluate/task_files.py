"""The files that tasks are read from: jsonl, plain or compressed, and parquet, on local disks and object stores."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import parquet

from ray_ds import storage
from ray_ds.artifacts import SourceFile
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.config.tasks import TaskSettings
from ray_ds.errors import ConfigError, InputError

JSONL_ENDINGS = (".jsonl", ".ndjson")
SHOWN_CHARACTERS = 80
"""How much of a bad line an error shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A line or row of a task's files."""

    uri: str
    row: int
    """From 1: the line of a jsonl file, the row of a parquet file."""
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Return where the item is, for people."""
        return f"{self.uri} {'row' if self.uri.endswith('.parquet') else 'line'} {self.row}"

    @property
    def name(self) -> str:
        """Return what the item is called in side files: the same wherever the file lies."""
        return f"{self.uri.rsplit('/', 1)[-1]}:{self.row}"


def fingerprint_tasks(settings: EvaluateSettings) -> list[SourceFile]:
    """Return every file that tasks and ratings are read from, with its sha256, task, source and licence.

    Raises:
        ConfigError, InputError: as `find_task_files` and `find_lm_eval_files`.
    """
    found: list[SourceFile] = []
    for i, task in enumerate(settings.tasks):
        for field, pattern in (("files", task.files), ("shot_files", task.shot_files)):
            for uri in find_task_files(pattern, f"tasks.{i}.{field}") if pattern is not None else []:
                found.append(_fingerprint(uri, f"{field} of task {task.name}: {task.source}", task.licence))
    if settings.lm_eval is not None:
        for uri in find_lm_eval_files(settings.lm_eval):
            found.append(_fingerprint(uri, f"lm_eval: {settings.lm_eval.source}", settings.lm_eval.licence))
    if settings.ratings is not None:
        found += [_fingerprint(uri, "ratings", "not stated") for uri in find_task_files(settings.ratings, "ratings")]
    return found


def _fingerprint(uri: str, source: str, licence: str) -> SourceFile:
    system, path = storage.filesystem(uri)
    size = system.get_file_info(path).size or 0
    return SourceFile(uri=uri, bytes=size, sha256=storage.sha256_of_version(uri), source=source, licence=licence)


def find_lm_eval_files(settings: LmEvalSettings) -> list[str]:
    """Return all files below the folder of lm-evaluation-harness's tasks, sorted, but what Python compiled.

    Raises:
        ConfigError: the folder is relative.
        InputError: it holds no YAML file.
    """
    _check_absolute(settings.include_path, "lm_eval.include_path")
    files = [uri for uri in storage.glob_files(f"{settings.include_path}/**") if "__pycache__" not in uri.split("/")]
    if not any(uri.endswith(".yaml") for uri in files):
        allowed = "must be a folder with a task's .yaml file; there is none"
        raise InputError("lm_eval.include_path", settings.include_path, allowed, "check the path")
    return files


def _check_absolute(path: str, field: str) -> None:
    if not storage.is_absolute(path):
        allowed = "must be absolute, because a job's working directory is a copy on each node"
        raise ConfigError(field, path, allowed, "write an absolute path or URI, or pass --root")


def find_task_files(pattern: str, field: str) -> list[str]:
    """Return the files that a pattern matches, sorted.

    Raises:
        ConfigError: it is relative.
        InputError: it matches nothing, or a file of another format.
    """
    _check_absolute(pattern, field)
    found = storage.glob_files(pattern)
    if not found:
        raise InputError(field, pattern, "must match a file or more; it matches none", "check path and pattern")
    for uri in found:
        if not _stem(uri).endswith((*JSONL_ENDINGS, ".parquet")):
            allowed = "must end in .jsonl, .ndjson (also with .gz or .zst) or .parquet"
            raise InputError(field, uri, allowed, "rename it, or narrow the pattern")
    return found


def read_items(task: TaskSettings, *, shots: bool = False) -> list[Item]:
    """Return the items of a task, or those that its shots are drawn from, in order of file and row.

    Raises:
        ConfigError, InputError: as `find_task_files`; or a file is damaged, or holds nothing.
    """
    field, pattern = ("shot_files", task.shot_files) if shots and task.shot_files else ("files", task.files)
    where = f"task {task.name}: {field}"
    items = [item for uri in find_task_files(str(pattern), where) for item in read_file(uri)]
    if not items:
        raise InputError(where, str(pattern), "must hold an item or more; it holds none", "check the files")
    return items


def _stem(uri: str) -> str:
    """Return a file's name without the ending of its compression."""
    return uri.lower().removesuffix(".gz").removesuffix(".zst")


def read_file(uri: str) -> Iterator[Item]:
    """Yield the lines or rows of a file that `find_task_files` found.

    Raises:
        InputError: it is damaged.
    """
    data = storage.read_bytes(uri)
    if _stem(uri).endswith(".parquet"):
        yield from _read_parquet(uri, data)
        return
    try:
        if uri.lower().endswith(".gz"):
            data = gzip.decompress(data)
        elif uri.lower().endswith(".zst"):
            data = _decompress_zstd(data)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(uri, str(error), "must be a whole compressed file", "restore it") from error
    for row, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield Item(uri=uri, row=row, values=_parse_line(line, f"{uri} line {row}"))


def _decompress_zstd(data: bytes) -> bytes:
    """Return the content of zstd frames; one by one, so that a cut one is noticed.

    Raises:
        EOFError, zstandard.ZstdError: a frame is cut or damaged.
    """
    parts: list[bytes] = []
    while data:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        parts.append(decoder.decompress(data))
        if not decoder.eof:
            raise EOFError("the file ends inside a zstd frame")
        data = decoder.unused_data
    return b"".join(parts)


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        shown = line[:SHOWN_CHARACTERS].decode("utf-8", errors="replace").strip()
        raise InputError(place, shown, f"must be a JSON object ({error})", "mend or remove the line") from error
    if not isinstance(value, dict):
        raise InputError(place, type(value).__name__, "must be a JSON object", "mend or remove the line")
    return value


def _read_parquet(uri: str, data: bytes) -> Iterator[Item]:
    try:
        table = parquet.read_table(io.BytesIO(data))
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(uri, reason, "must be a whole parquet file", "restore it") from error
    for row, values in enumerate(rows, start=1):
        yield Item(uri=uri, row=row, values=values)
