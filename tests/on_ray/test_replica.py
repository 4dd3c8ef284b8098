import hashlib
import os
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from ray_ds.artifacts import Checkpoint, FileInfo, Manifest
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.errors import ArtifactError
from ray_ds.on_ray import replica
from ray_ds.on_ray.replica import autoscaling_config, build_application, check_model_files, local_model_folder


def test_autoscaling_is_what_the_settings_say() -> None:
    config = autoscaling_config(AutoscalingSettings(min_replicas=2, max_replicas=5, target_ongoing_requests=3.0))
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 3.0)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (5.0, 60.0)
    assert config.look_back_period_s > config.metrics_interval_s, "else Serve averages over a single sample"


def test_a_deployment_reserves_what_it_uses_and_leaves_refusing_to_the_engine() -> None:
    settings = ServeSettings(cpus_per_replica=3, max_running_requests=5, max_queued_requests=7)
    deployment = build_application("/runs/m/0", "0" * 16, settings, None)._bound_deployment
    assert deployment.ray_actor_options["num_cpus"] == 3 and deployment.ray_actor_options["num_gpus"] == 0
    assert deployment.ray_actor_options["runtime_env"] == {"working_dir": "local:///"}
    assert deployment.max_ongoing_requests > 12
    assert deployment.max_queued_requests == -1


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
        replica.storage, "read_blocks", lambda uri: [(source / uri.removeprefix("s3://bucket/a/")).read_bytes()]
    )
    folder = local_model_folder(checkpoint, tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    monkeypatch.setattr(replica.storage, "read_blocks", lambda uri: pytest.fail("copied twice"))
    assert local_model_folder(checkpoint, tmp_path / "cache") == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [checkpoint.digest]


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "a", str(tmp_path / "a"))
    check_model_files(checkpoint, tmp_path / "a" / "model")
    (tmp_path / "a" / "model" / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 .*\) must have sha256 .*; delete .*model"):
        check_model_files(checkpoint, tmp_path / "a" / "model")
