import os
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from ray_ds import storage
from ray_ds.artifacts import Artifact
from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ArtifactError
from ray_ds.on_ray.replica import build_application, check_model_files
from tests.stages.small_artifacts import stage_run


def test_a_deployment_reserves_what_it_uses_and_leaves_refusing_to_the_engine() -> None:
    settings = ServeSettings(cpus_per_replica=3, max_running_requests=5, max_queued_requests=7)
    deployment = build_application("/runs/m/0", "0" * 16, settings, None)._bound_deployment
    assert deployment.ray_actor_options["num_cpus"] == 3 and deployment.ray_actor_options["num_gpus"] == 0
    assert deployment.ray_actor_options["runtime_env"] == {"working_dir": "local:///"}
    assert deployment.max_ongoing_requests > 12
    assert deployment.max_queued_requests == -1


def test_a_swap_keeps_the_old_replicas_until_the_new_ones_answer_unless_there_is_no_room() -> None:
    for percent in (100, 0):
        settings = ServeSettings(max_surge_percent=percent)
        deployment = build_application("/runs/m/0", "0" * 16, settings, None)._bound_deployment
        assert deployment._deployment_config.max_surge_percent == percent


def small_checkpoint(folder: Path, *names: str) -> Artifact:
    run = stage_run(folder, "Checkpoint")
    for name in names:
        storage.write_bytes(run.path("model", name), b"weights")
    return run.commit({}, seconds=0.0)


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path, "model.safetensors")
    folder = Path(checkpoint.path("model"))
    check_model_files(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 .*\) must have sha256 .*; delete .*model"):
        check_model_files(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 missing\) must have sha256"):
        check_model_files(checkpoint, folder)


@pytest.mark.shows("Weights come only from safetensors that the manifest names, byte for byte")
@pytest.mark.parametrize("name", ["model-00002.safetensors", "pytorch_model.bin", "deep/er.json"])
def test_a_file_that_is_none_of_the_manifests_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = small_checkpoint(tmp_path, "model.safetensors")
    folder = Path(checkpoint.path("model"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"surplus")
    with pytest.raises(ArtifactError, match=rf"{name} \(surplus\) must be in the manifest of .*; delete .*{name}"):
        check_model_files(checkpoint, folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "a.pkl"])
def test_a_pickle_is_refused_though_its_checksum_matches(tmp_path: Path, name: str) -> None:
    checkpoint = small_checkpoint(tmp_path, "model.safetensors", name)
    with pytest.raises(ArtifactError, match=rf"{name} \(a pickle\) must be safetensors, JSON or text; export"):
        check_model_files(checkpoint, Path(checkpoint.path("model")))
