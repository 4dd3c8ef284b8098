import asyncio
import hashlib
import logging
import os
import stat
from pathlib import Path

import pytest

from ray_ds.cli import argument_parser
from ray_ds.config.keys import ApiKey
from ray_ds.errors import ConfigError, InputError
from ray_ds.serve import keys as keys_module
from ray_ds.serve.keys import KeyRing, find_key, hash_api_key, new_key, read_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_new_key_is_found_by_its_hash_and_kept_nowhere(file: Path) -> None:
    alice = new_key(file, "alice", {"requests_per_minute": 60, "max_tokens": 100})
    bob = new_key(file, "bob", {})
    keys = read_keys(file)
    assert keys["alice"] == ApiKey(
        sha256=hashlib.sha256(alice.encode()).hexdigest(), requests_per_minute=60, max_tokens=100
    )
    assert find_key(keys, alice) == "alice" and find_key(keys, bob) == "bob"
    assert find_key(keys, alice + "x") is find_key(keys, "") is find_key(keys, "中\udc80") is None
    assert alice not in file.read_text() and bob not in file.read_text()
    assert len(alice) > 40 and alice != bob
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_line_without_its_end_is_not_run_into(file: Path) -> None:
    file.write_text(f'alice = {{sha256 = "{hash_api_key("a")}"}}')
    new_key(file, "bob", {})
    assert list(read_keys(file)) == ["alice", "bob"]


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("alice", {}, r"^name \(alice\) must be one that .*keys.toml does not have; choose another or delete its line"),
        ("al ice", {}, r"^name \(al ice\) must be 1 to 64 letters, digits, - or _; choose another"),
        ("", {}, r"^name \(\) must be 1 to 64 letters"),
        ("bob", {"max_tokens": 0}, r"^bob.max_tokens \(0\) must be greater than or equal to 1"),
    ],
)
def test_wrong_keys_are_not_made(file: Path, name: str, limits: dict[str, int], message: str) -> None:
    new_key(file, "alice", {})
    before = file.read_text()
    with pytest.raises(ConfigError, match=message):
        new_key(file, name, limits)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("alice = ", InputError, r"keys.toml \(.*\) must hold lines such as alice = .*ray-ds keys new"),
        (
            "alice = 5",
            ConfigError,
            r'keys.toml: alice \(5\) must be a table such as {sha256 = "..."}; correct',
        ),
        ("alice = {}", ConfigError, r"keys.toml: alice.sha256 \(missing\) must be given"),
        ('alice = {sha256 = "AB"}', ConfigError, r"keys.toml: alice.sha256 \(AB\) must"),
        (f'a = {{sha256 = "{"0" * 64}", rpm = 5}}', ConfigError, r"keys.toml: a.rpm \(5\) must be one of the known"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, text: str, error: type[Exception], message: str) -> None:
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_keys(file)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a file that can be written; mend it or name another"):
        new_key(tmp_path / "missing" / "keys.toml", "alice", {})


def names(ring: KeyRing) -> set[str]:
    return set(asyncio.run(ring.current()))


@pytest.mark.shows("API keys are made and revoked in a file, without a restart of the endpoint")
def test_changes_of_the_file_are_taken_up(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    new_key(file, "alice", {})
    fixed = {"team": ApiKey(sha256=hash_api_key("team"))}
    ring = KeyRing(fixed, file)
    new_key(file, "bob", {})
    assert names(ring) == {"team", "alice"}, "looked again before LOOK_INTERVAL_S was over"
    monkeypatch.setattr(keys_module, "LOOK_INTERVAL_S", 0.0)
    assert names(ring) == {"team", "alice", "bob"}
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    assert names(ring) == {"team", "bob"}
    with caplog.at_level(logging.ERROR, logger="ray_ds"):
        file.write_text("bob = ")
        assert names(ring) == {"team", "bob"}
    assert "the API keys stay as they were: " in caplog.text
    os.unlink(file)
    assert names(ring) == {"team"}


def test_the_command_prints_the_key_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argument_parser().parse_args(["keys", "new", "alice", "--file", str(file), "--tokens-per-minute", "9"])
    assert options.run(options) == 0
    [key] = capsys.readouterr().out.split()
    keys = read_keys(file)
    assert find_key(keys, key) == "alice" and keys["alice"].tokens_per_minute == 9
