"""`ray_ds.storage` on a real S3 server: what it does, what a reader sees meanwhile, and what failures say."""

import itertools
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ray_ds import object_store, storage
from ray_ds.errors import ConfigError, StorageRefused, StorageUnavailable
from tests.object_store.conftest import BUCKET, READER_KEY, READER_SECRET, Server, free_ports

MIB = 1 << 20


@pytest.mark.shows("`s3://bucket/x` works on any S3-compatible store: its address is `AWS_ENDPOINT_URL`")
def test_a_file_comes_back_as_it_was_written(folder: str) -> None:
    data = os.urandom(12 * MIB + 17)
    for name, content in (("big", data), ("small", b"x"), ("empty", b""), ("text.gz", b"as it is")):
        uri = storage.join(folder, name)
        storage.write_bytes(uri, content)
        assert storage.read_bytes(uri) == content
        assert b"".join(storage.read_blocks(uri)) == content
    assert storage.list_files(folder) == [
        storage.FileEntry(path="big", bytes=len(data)),
        storage.FileEntry(path="empty", bytes=0),
        storage.FileEntry(path="small", bytes=1),
        storage.FileEntry(path="text.gz", bytes=8),
    ]


def test_the_address_for_s3_alone_goes_first(folder: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    storage.write_bytes(storage.join(folder, "x"), b"1")
    assert storage.exists(storage.join(folder, "x"))


def test_a_folder_is_there_while_it_has_files(folder: str) -> None:
    storage.delete_folder(folder)
    assert not storage.exists(folder) and storage.list_files(folder) == []
    storage.write_bytes(storage.join(folder, "a/b/c"), b"1")
    storage.write_bytes(storage.join(folder, "a-not"), b"1")
    assert storage.exists(storage.join(folder, "a")) and storage.exists(storage.join(folder, "a/b/c"))
    storage.delete_folder(storage.join(folder, "a"))
    assert not storage.exists(storage.join(folder, "a"))
    assert [entry.path for entry in storage.list_files(folder)] == ["a-not"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "a/b/c"))


def test_names_are_taken_as_they_are(folder: str) -> None:
    names = ["50%25 of.txt", "a#b.txt", "c?d.txt", "ü ü.txt", "x/y+z.txt"]
    for name in names:
        storage.write_bytes(storage.join(folder, name), name.encode())
    found = storage.glob_files(f"{folder}/**/*.txt")
    assert found == [storage.join(folder, name) for name in sorted(names)]
    assert [storage.read_bytes(uri).decode() for uri in found] == sorted(names)
    assert storage.glob_files(f"{folder}/x/*") == [storage.join(folder, "x/y+z.txt")]


def test_a_file_written_again_has_another_digest(folder: str) -> None:
    uri = storage.join(folder, "x")
    storage.write_bytes(uri, b"one")
    first = storage.sha256_of_version(uri)
    time.sleep(1.1)  # an object's time has seconds
    storage.write_bytes(uri, b"two")
    assert storage.sha256_of_version(uri) != first


WRITER = """
import sys
from ray_ds import storage
for letter in sys.argv[2] * 1000:
    storage.write_bytes(sys.argv[1], letter.encode() * (12 << 20))
    print(letter, flush=True)
"""


def test_a_reader_sees_all_or_nothing_of_a_writer_that_is_killed(folder: str) -> None:
    uri = storage.join(folder, "x")
    chance = random.Random(0)
    for letters in ("ab", "cd", "ef"):
        with subprocess.Popen([sys.executable, "-c", WRITER, uri, letters], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline()
            time.sleep(chance.uniform(0.05, 0.4))
            writer.send_signal(signal.SIGKILL)
        content = storage.read_bytes(uri)
        assert len(content) == 12 * MIB
        assert content[:1].decode() in letters and content.count(content[:1]) == len(content)
    assert [entry.path for entry in storage.list_files(folder)] == ["x"]


def test_a_server_that_comes_back_in_time_is_waited_for(folder: str, server: Server) -> None:
    kept, written = storage.join(folder, "kept"), storage.join(folder, "written")
    data = os.urandom(12 * MIB)
    storage.write_bytes(kept, data)
    blocks = storage.read_blocks(kept)
    first = next(blocks)
    server.kill()
    starts = threading.Timer(1.0, server.start, kwargs={"wait": False})
    starts.start()
    storage.write_bytes(written, data)
    assert first + b"".join(blocks) == data
    assert storage.read_bytes(written) == data
    starts.join()


@pytest.mark.shows("An object store that stays away ends the job as retryable, a wrong key as the user's to mend")
def test_a_server_that_stays_away_is_unavailable(folder: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    uri = storage.join(folder, "x")
    storage.write_bytes(uri, b"old")
    server.kill()
    try:
        for act in (lambda: storage.write_bytes(uri, b"new" * MIB), lambda: storage.list_files(folder)):
            begun = time.monotonic()
            with pytest.raises(
                StorageUnavailable, match=rf"{folder}.*connect.*check AWS_ENDPOINT_URL \({server.endpoint}\)"
            ):
                act()
            assert time.monotonic() - begun < 10
    finally:
        server.start()
    assert storage.read_bytes(uri) == b"old"


def test_a_key_without_the_right_is_refused_and_says_so(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(folder, "x")
    storage.write_bytes(uri, b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    assert storage.read_bytes(uri) == b"1"
    with pytest.raises(StorageRefused, match=rf"{uri} .*ACCESS_DENIED.* must be open.*AWS_ACCESS_KEY_ID the right"):
        storage.write_bytes(uri, b"2")
    with pytest.raises(StorageRefused, match="Access Denied"):
        storage.delete_folder(folder)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageRefused, match="AWS_SECRET_ACCESS_KEY"):
        storage.read_bytes(uri)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageRefused, match=r"INVALID_ACCESS_KEY_ID.*check AWS_ACCESS_KEY_ID"):
        storage.list_files(folder)


def test_a_bucket_that_is_not_there_is_refused(server: Server) -> None:
    with pytest.raises(StorageRefused, match=r"NO_SUCH_BUCKET.*create the bucket"):
        storage.write_bytes("s3://no-such-bucket/x", b"1")


@pytest.mark.parametrize("uri", [f"s3://{BUCKET}/x?region=a", f"s3://key:secret@{BUCKET}/x"])
def test_options_and_keys_belong_in_the_environment(uri: str) -> None:
    with pytest.raises(ConfigError, match="must be a bucket and a path alone; set AWS_ENDPOINT_URL"):
        storage.exists(uri)


@contextmanager
def answering(statuses: Iterator[int]) -> Iterator[tuple[str, list[int]]]:
    """Run a server that answers each request with the next status; give its address and what it answered."""
    answered: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = next(statuses)
            answered.append(status)
            body = b"<Error><Code>SlowDown</Code></Error>" if status == 503 else b"content"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    store = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{store.server_port}", answered
    finally:
        store.shutdown()
        store.server_close()


def test_a_store_that_asks_for_patience_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(itertools.chain([503, 503], itertools.repeat(200))) as (endpoint, answered):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert storage.exists("s3://bucket/x")
    assert answered == [503, 503, 200]


def test_a_store_that_only_asks_for_patience_is_unavailable(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(itertools.repeat(503)) as (endpoint, answered):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        with pytest.raises(StorageUnavailable, match=r"SLOW_DOWN|503"):
            storage.exists("s3://bucket/x")
    assert answered == [503, 503, 503]


def test_a_store_that_never_answers_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match="Timeout was reached"):
            storage.read_bytes("s3://bucket/x")
    assert time.monotonic() - begun < 15


def test_errors_of_a_store_travel_between_processes() -> None:
    refused = StorageRefused("s3://b/x", "ACCESS_DENIED", "must be open to this process", "check the key", 13)
    unavailable = StorageUnavailable("s3://b/x", "timeout", "submit again")
    for error in (refused, unavailable):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and copy.errno == error.errno
    assert str(refused) == "s3://b/x (ACCESS_DENIED) must be open to this process; check the key."
    assert str(unavailable) == "s3://b/x (no answer: timeout) must be reachable; submit again."
