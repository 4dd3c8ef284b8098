"""A finished model as an application that a Serve configuration names, such as that of KubeRay's RayService:
`import_path: ray_ds.on_ray.served_model:application`.

Where a job of the serve stage deploys by itself, a RayService wants to be told what runs, so that it can bring it up
again on a new cluster before it takes the old one away.
"""

import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from ray_ds.artifacts import Checkpoint, QuantizedModel, open_artifact
from ray_ds.config.serve import ServeSettings
from ray_ds.config.settings import decode_settings
from ray_ds.errors import ConfigError
from ray_ds.on_ray.replica import build_application
from ray_ds.serve.keys import hash_api_key


def application(args: Mapping[str, Any]) -> Application:
    """Return the application of `args`: `artifact`, the folder of a finished model, and `settings`, the serve stage's.

    Raises:
        ConfigError: an argument is missing or unknown, a setting is wrong, or the API key's variable is empty.
        ArtifactError: there is no finished model in that folder.
    """
    unknown = sorted(set(args) - {"artifact", "settings"})
    if unknown or "artifact" not in args:
        value = unknown[0] if unknown else "no artifact"
        raise ConfigError("args", value, "must be artifact and settings", "correct args in serveConfigV2")
    settings = decode_settings(ServeSettings, args.get("settings", {}), where="args.settings")
    artifact = open_artifact(args["artifact"], [QuantizedModel, Checkpoint])
    return build_application(artifact.uri, artifact.digest, settings, _api_key_hash(settings))


def _api_key_hash(settings: ServeSettings) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        allowed = "must name an environment variable of every pod that holds the key"
        action = "create the secret that rayservice.yaml names"
        raise ConfigError("args.settings.api_key_env", settings.api_key_env, allowed, action)
    return hash_api_key(key)
