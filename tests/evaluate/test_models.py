"""Models of artefacts are read where they lie, or copied to this node once."""

import hashlib
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.artifacts import Checkpoint, FileInfo, Manifest
from ray_ds.model.local_folder import local_model_folder


def make_checkpoint(folder: Path, uri: str) -> Checkpoint:
    files = {"model/config.json": b"{}", "model/model.safetensors": b"weights", "curve.png": b"png"}
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    manifest = Manifest(
        kind="Checkpoint",
        digest="0123456789abcdef",
        step="train",
        stage="train",
        stage_version=1,
        settings={},
        inputs=(),
        sources=(),
        files=tuple(
            FileInfo(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in files.items()
        ),
        facts={},
        seconds=0.0,
        package_version="0",
    )
    return Checkpoint(uri=uri, manifest=manifest)


def test_a_local_artefact_is_read_where_it_lies(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "a", str(tmp_path / "a"))
    assert local_model_folder(checkpoint, tmp_path / "cache") == tmp_path / "a" / "model"
    assert not (tmp_path / "cache").exists()


def test_a_remote_artefact_is_copied_once_to_the_nodes_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "store"
    checkpoint = make_checkpoint(source, "s3://bucket/a")
    monkeypatch.setattr(
        storage, "read_blocks", lambda uri: [(source / uri.removeprefix("s3://bucket/a/")).read_bytes()]
    )
    folder = local_model_folder(checkpoint, tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    monkeypatch.setattr(storage, "read_blocks", lambda uri: pytest.fail("copied twice"))
    assert local_model_folder(checkpoint, tmp_path / "cache") == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [checkpoint.digest]
