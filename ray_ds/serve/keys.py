"""API keys: only their hashes are kept, in a file that may change while it is used.

The file is TOML, a line a key: `alice = {sha256 = "9f86...", requests_per_minute = 60}`. Deleting the line revokes the
key. `ray-ds keys new alice --file keys.toml` makes a key and appends its line.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

from ray_ds.config.keys import ApiKey
from ray_ds.config.settings import decode_settings
from ray_ds.errors import ConfigError, InputError

LOOK_INTERVAL_S = 1.0
"""A request looks whether the file has changed where nobody did for so long: a revoked key is refused 1 s later."""
KEY_PREFIX = "sk-"
KEY_BYTES = 32
"""256 random bits cannot be guessed, so a plain sha256, which is quick to compute, keeps them."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

logger = logging.getLogger(__name__)


def hash_api_key(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def find_key(keys: Mapping[str, ApiKey], key: str) -> str | None:
    """Return the name of the entry that a key belongs to; takes the same time whatever the key."""
    digest = hash_api_key(key)
    found = None
    for name, entry in keys.items():
        if hmac.compare_digest(entry.sha256, digest):
            found = name
    return found


def read_keys(path: Path) -> dict[str, ApiKey]:
    """Return the keys of a file by name; none where there is no such file.

    Raises:
        InputError: it cannot be read, or is no TOML.
        ConfigError: a line is wrong.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        action = "correct the line, or make keys with `ray-ds keys new`"
        raise InputError(str(path), str(error), 'must hold lines such as alice = {sha256 = "..."}', action) from error
    keys = {}
    for name, raw in table.items():
        where = f"{path}: {name}"
        if not isinstance(raw, dict):
            raise ConfigError(where, raw, 'must be a table such as {sha256 = "..."}', "correct the line")
        keys[name] = decode_settings(ApiKey, raw, where=where)
    return keys


def new_key(path: Path, name: str, limits: Mapping[str, int]) -> str:
    """Return a new key after appending its line to a file that only its owner can read.

    Args:
        limits: fields of `ApiKey` beside `sha256`.
    Raises:
        ConfigError: the name is taken or malformed, or a limit is wrong.
        InputError: the file is damaged or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "must be 1 to 64 letters, digits, - or _", "choose another")
    if name in read_keys(path):
        raise ConfigError("name", name, f"must be one that {path} does not have", "choose another or delete its line")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = {"sha256": hash_api_key(key), **limits}
    decode_settings(ApiKey, entry, where=name)
    fields = ", ".join(
        f'{field} = "{value}"' if field == "sha256" else f"{field} = {value}" for field, value in entry.items()
    )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            data = file.read()
            ending = b"" if not data or data.endswith(b"\n") else b"\n"
            file.write(ending + f"{name} = {{{fields}}}\n".encode())
    except OSError as error:
        raise InputError(
            str(path), str(error), "must be a file that can be written", "mend it or name another"
        ) from error
    return key


class KeyRing:
    """The keys that are valid now: one that never changes, and those of a file."""

    def __init__(self, fixed: Mapping[str, ApiKey], path: Path | None) -> None:
        """Read the file.

        Raises:
            InputError, ConfigError: as `read_keys`.
        """
        self._fixed = dict(fixed)
        self._path = path
        self._version = _version(path)
        self._from_file = {} if path is None else read_keys(path)
        self._looked = time.monotonic()

    async def current(self) -> Mapping[str, ApiKey]:
        """Return the valid keys by name. A file that is damaged leaves those it had; one that is gone leaves none."""
        if self._path is not None and time.monotonic() >= self._looked + LOOK_INTERVAL_S:
            self._looked = time.monotonic()
            await asyncio.to_thread(self._look)
        return {**self._from_file, **self._fixed}

    def _look(self) -> None:
        """Read the file again if it has changed."""
        assert self._path is not None
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._from_file = read_keys(self._path)
        except (InputError, ConfigError) as error:
            logger.error("the API keys stay as they were: %s", error)


def _version(path: Path | None) -> tuple[int, int, int] | None:
    """Return what is different about a file that was changed; None where there is none."""
    try:
        state = None if path is None else path.stat()
    except OSError:
        return None
    return None if state is None else (state.st_ino, state.st_mtime_ns, state.st_size)
