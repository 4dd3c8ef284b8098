"""Reading conversations and pairs of answers from files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ray_ds import storage
from ray_ds.artifacts import SourceFile
from ray_ds.chat.encoding import ASSISTANT, ChatEncoder, EncodedChat
from ray_ds.chat.template import Message
from ray_ds.config.tokenize_chat import TokenizeChatSettings
from ray_ds.errors import InputError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"


def find_sources(settings: TokenizeChatSettings) -> list[SourceFile]:
    """Return every file of conversations, and the template's file last, with their sha256.

    Raises:
        InputError: a glob matches nothing, a file is neither jsonl nor parquet, or the template is missing.
    """
    found = []
    for index, files in enumerate(settings.inputs):
        uris = storage.glob_files(files.glob)
        if not uris:
            allowed = "must match a file or more; it matches none"
            raise InputError(f"inputs.{index}.glob", files.glob, allowed, "check path and pattern")
        for uri in uris:
            if not uri.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX)):
                allowed = f"must end in {', '.join(JSONL_SUFFIXES)} or {PARQUET_SUFFIX}"
                raise InputError(f"inputs.{index}.glob", uri, allowed, "rename it, or narrow the glob")
            found.append(_describe(uri, files.source, files.licence))
    if settings.template is not None:
        if not storage.exists(settings.template):
            raise InputError("template", settings.template, "must be a file", "check the path")
        found.append(_describe(settings.template, "chat template", ""))
    return found


def _describe(uri: str, source: str, licence: str) -> SourceFile:
    system, path = storage.filesystem(uri)
    size: int = system.get_file_info(path).size or 0
    return SourceFile(uri=uri, bytes=size, sha256=storage.sha256_of_version(uri), source=source, licence=licence)


def read_records(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each record of a file is, and the record.

    Raises:
        InputError: the file or a record is damaged.
    """
    system, path = storage.filesystem(uri)
    try:
        if uri.endswith(PARQUET_SUFFIX):
            with system.open_input_file(path) as file:
                for number, row in enumerate(_parquet_rows(parquet.ParquetFile(file))):
                    yield f"{uri} row {number}", row
            return
        compression = {".gz": "gzip", ".zst": "zstd"}.get(uri[uri.rfind(".") :])
        with system.open_input_stream(path, compression=compression) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if line.strip():
                    yield f"{uri} line {number}", _parse(uri, number, line)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(uri, reason, "must be a whole jsonl or parquet file", "mend it") from error


def _parquet_rows(file: parquet.ParquetFile) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(256):
        yield from batch.to_pylist()


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _parse(uri: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{uri} line {number}", str(error), "must be JSON", "mend or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(f"{uri} line {number}", type(record).__name__, "must be an object", "mend or remove the line")
    return record


def encode_record(record: Mapping[str, Any], place: str, encoder: ChatEncoder, task: str) -> list[EncodedChat]:
    """Return a record's documents: a conversation, or a better and a worse answer to one prompt.

    Raises:
        InputError: it lacks a field, a message is none, or nothing is to be learnt from it.
    """
    try:
        if task == "chat":
            encoded = [encoder.encode(as_messages(record, "messages", "user"))]
        else:
            prompt = as_messages(record, "prompt" if "prompt" in record else "messages", "user")
            answers = [as_messages(record, name, ASSISTANT) for name in ("chosen", "rejected")]
            encoded = [encoder.encode([*prompt, *answer], first_answer=len(prompt)) for answer in answers]
    except InputError as error:
        raise InputError(f"{place}: {error.field}", error.value, error.allowed, error.action) from error
    if not all(any(chat.is_answer) for chat in encoded):
        raise InputError(place, "no answer", f"must have a message of role {ASSISTANT}", "remove the record")
    return encoded


def as_messages(record: Mapping[str, Any], name: str, role: str) -> Sequence[Message]:
    """Return a field of a record as messages; a plain text is one of `role`.

    Raises:
        InputError: it is missing or holds something else.
    """
    value = record.get(name)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return value
    allowed = "must be a text or a list of {role, content}"
    shown = "missing" if value is None else json.dumps(value, default=str)[:80]
    raise InputError(name, shown, allowed, "mend or remove the record")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
