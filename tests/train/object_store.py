"""An object store in memory that refuses requests and lists late, at will."""

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from ray_ds import storage

SCHEME = "s3://"


class ObjectStore(fs.FileSystemHandler):  # type: ignore[misc]
    """Objects by key; there are no folders but those that keys spell."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_requests = 0
        self.refuses: Callable[[int, str, str], bool] = lambda number, verb, key: False
        """Told a request's number, verb and key, says whether it is refused."""
        self.hides: Callable[[str], bool] = lambda key: False
        """Says which keys a listing does not show yet."""
        self.requests: list[tuple[str, str]] = []

    def _ask(self, verb: str, key: str) -> None:
        self.num_requests += 1
        self.requests.append((verb, key))
        if self.refuses(self.num_requests, verb, key):
            raise OSError(f"{verb} {key}: 503 SlowDown")

    def _info(self, key: str) -> fs.FileInfo:
        if key in self.objects:
            return fs.FileInfo(key, fs.FileType.File, size=len(self.objects[key]))
        if any(other.startswith(key.rstrip("/") + "/") for other in list(self.objects)):
            return fs.FileInfo(key, fs.FileType.Directory)
        return fs.FileInfo(key, fs.FileType.NotFound)

    def get_type_name(self) -> str:
        return "memory"

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        for path in paths:
            self._ask("HEAD", path)
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        self._ask("LIST", selector.base_dir)
        assert selector.recursive
        prefix = selector.base_dir.rstrip("/") + "/"
        return [self._info(key) for key in list(self.objects) if key.startswith(prefix) and not self.hides(key)]

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self._ask("GET", path)
        if path not in self.objects:
            raise FileNotFoundError(2, "no such key", path)
        return pa.PythonFile(io.BytesIO(self.objects[path]), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        self._ask("POST", path)
        return pa.PythonFile(_Upload(self, path), mode="w")

    def delete_file(self, path: str) -> None:
        self._ask("DELETE", path)
        self.objects.pop(path, None)

    def delete_dir(self, path: str) -> None:
        for key in [key for key in list(self.objects) if key.startswith(path.rstrip("/") + "/")]:
            self.delete_file(key)

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        raise AssertionError("nobody deletes a whole bucket")

    def move(self, src: str, dest: str) -> None:
        raise AssertionError("object stores do not move")

    def copy_file(self, src: str, dest: str) -> None:
        raise AssertionError("not used")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise AssertionError("object stores do not append")

    def normalize_path(self, path: str) -> str:
        return path


class _Upload(io.RawIOBase):
    """An object that appears when it is closed."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store, self._key, self._data = store, key, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._store._ask("PUT", self._key)
        self._data += data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._store._ask("PUT", self._key)
            self._store.objects[self._key] = bytes(self._data)


def use_object_store(monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Make every `s3://` URI lie on a store of the test's own."""
    store = ObjectStore()
    system = fs.PyFileSystem(store)
    original = storage.filesystem

    def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
        return (system, uri.removeprefix(SCHEME)) if uri.startswith(SCHEME) else original(uri)

    monkeypatch.setattr(storage, "filesystem", filesystem)
    return store
