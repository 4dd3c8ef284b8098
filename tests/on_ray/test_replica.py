import os
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest

from ray_ds import storage
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


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "Checkpoint")
    storage.write_bytes(run.path("model", "model.safetensors"), b"weights")
    checkpoint = run.commit({}, seconds=0.0)
    folder = Path(checkpoint.path("model"))
    check_model_files(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 .*\) must have sha256 .*; delete .*model"):
        check_model_files(checkpoint, folder)
