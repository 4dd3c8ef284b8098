import os
from pathlib import Path

import pytest

from tests.train.processes import ON_CPU, spawn


def write_environment(rank: int, folder: Path) -> None:
    (folder / str(rank)).write_text(" ".join(os.environ[name] for name in ON_CPU))


def test_processes_have_an_environment_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    spawn(write_environment, (tmp_path,), count=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["cpu 1", "cpu 1"]
    assert "TORCHDYNAMO_DISABLE" not in os.environ
