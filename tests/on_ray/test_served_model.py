"""The application that a RayService deploys, built from a model on disk."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"

from pathlib import Path

import pytest

from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.on_ray.served_model import application
from ray_ds.serve.keys import hash_api_key
from tests.stages.small_artifacts import stage_run


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^args \(no artifact\) must be artifact and settings; correct args"):
        application({})
    with pytest.raises(ConfigError, match=r"^args \(modell\) must be artifact and settings"):
        application({"artifact": "/a", "modell": 1})
    with pytest.raises(ConfigError, match=r"^args.settings.prt \(1\) must be one of the known settings"):
        application({"artifact": "/a", "settings": {"prt": 1}})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no manifest.* must be a finished QuantizedModel or Checkpoint"):
        application({"artifact": str(tmp_path)})


def test_it_is_the_artefact_with_the_settings_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stage_run(tmp_path, "Checkpoint").commit({}, seconds=0.0)
    args = {"artifact": model.uri, "settings": {"host": "0.0.0.0", "api_key_env": "TEST_KEY", "cpus_per_replica": 3}}
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^args.settings.api_key_env \(TEST_KEY\) must name an environment variable"):
        application(args)
    monkeypatch.setenv("TEST_KEY", "secret")
    deployment = application(args)._bound_deployment
    uri, digest, settings, api_key_hash = deployment.init_args
    assert (uri, digest, api_key_hash) == (model.uri, model.digest, hash_api_key("secret"))
    assert settings.host == "0.0.0.0" and deployment.ray_actor_options["num_cpus"] == 3
