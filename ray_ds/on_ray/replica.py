"""The deployment: one process that holds a model, its engine and its HTTP routes.

A replica may start on a node that joined after the job that deployed it was gone. It imports the installed package,
reads the artefact by URI, and has no part of a job's working directory (ray#33799).
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel, open_artifact
from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import TEMPLATE_FILE, ChatTemplate
from ray_ds.config.keys import ApiKey
from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ArtifactError
from ray_ds.logs import log_event, setup_logging
from ray_ds.model.local_folder import local_model_folder
from ray_ds.on_ray.autoscaling import autoscaling_config
from ray_ds.on_ray.grpc_ingress import GrpcMethods
from ray_ds.on_ray.shared_ledger import SharedLedger, ledger_actor
from ray_ds.serve.build import build_engine
from ray_ds.serve.engine import Engine
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.app import build_app
from ray_ds.serve.http.service import CompletionService, ModelCard
from ray_ds.serve.keys import KeyRing
from ray_ds.serve.limits import LocalLedger
from ray_ds.serve.load import load_served_model
from ray_ds.serve.safety.policy import make_policy
from ray_ds.serve.safety.screened_engine import ScreenedEngine
from ray_ds.serve.scaling.load import report_load
from ray_ds.tokenizer import BpeTokenizer, load_tokenizer

HEALTH_REQUESTS = 16
"""Requests a replica takes beyond those its engine may hold, so that `/health` and refusals are answered at once."""
CONSTRUCTOR_RETRIES = 2
"""Tries of a replica that cannot start; a damaged artefact stays damaged."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
NO_WORKING_DIR = "local:///"
"""A working directory that every node has. Without one a replica inherits that of the job, which goes with the job."""


@serve.ingress()
class ModelReplica(GrpcMethods):
    """Serves one model. Its engine has a thread of its own, so that health checks and streams never wait for it."""

    def __init__(self, artifact_uri: str, digest: str, settings: ServeSettings, api_key_hash: str | None) -> None:
        setup_logging()
        started = time.monotonic()
        artifact = open_artifact(artifact_uri, [QuantizedModel, Checkpoint])
        folder = local_model_folder(artifact, Path(tempfile.gettempdir()) / f"ray_ds_models-{os.getuid()}")
        check_model_files(artifact, folder)
        device = torch.device("cuda" if settings.gpus_per_replica else "cpu")
        torch.set_num_threads(settings.cpus_per_replica)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        is_quantized = isinstance(artifact, QuantizedModel)
        model = load_served_model(folder, is_quantized=is_quantized, device=device, dtype=dtype)
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        self._engine = build_engine(model.decoder, tokenizer, settings)
        card = ModelCard(
            model_id=settings.model_id,
            digest=digest,
            model_digest=artifact.digest,
            kind=artifact.kind,
            integer_path=model.integer_path,
            created=int(time.time()),
        )
        self._service = CompletionService(
            engine=screened(self._engine, tokenizer, settings),
            tokenizer=tokenizer,
            card=card,
            access=make_access(settings, api_key_hash),
            max_body_bytes=settings.max_body_bytes,
            chat=_load_chat(folder, tokenizer),
        )
        self._engine.start()
        seconds = time.monotonic() - started
        log_event("model_loaded", model=artifact.uri, device=device, integer_path=model.integer_path, seconds=seconds)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the routes; Serve asks for them once the model is loaded."""
        return build_app(self._service)

    def check_health(self) -> None:
        """Tell Serve to replace this replica when its engine has failed.

        Raises:
            RuntimeError: it has.
        """
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the number of replicas follows; Serve asks twice a second."""
        return report_load(self._engine.stats)

    def __del__(self) -> None:
        """End the engine, after Serve has waited for the open requests."""
        if hasattr(self, "_engine"):
            self._engine.close()


def screened(engine: Engine, tokenizer: BpeTokenizer, settings: ServeSettings) -> Engine | ScreenedEngine:
    """Return the engine, behind the safety filter where the settings want one."""
    policy = make_policy(settings.safety)
    return engine if policy is None else ScreenedEngine(engine, tokenizer, policy)


def make_access(settings: ServeSettings, api_key_hash: str | None) -> Access:
    """Return who may ask what; the keys of a file share their limits over all replicas."""
    keys = None
    if api_key_hash is not None:
        path = None if settings.api_keys_file is None else Path(settings.api_keys_file)
        keys = KeyRing({str(settings.api_key_env): ApiKey(sha256=api_key_hash)}, path)
    return Access(
        keys=keys,
        ledger=LocalLedger() if settings.api_keys_file is None else SharedLedger(),
        request_timeout_s=settings.request_timeout_s,
    )


def _load_chat(folder: Path, tokenizer: BpeTokenizer) -> ChatEncoder | None:
    """Return how a model's messages become prompts, if it has a chat template."""
    file = folder / TEMPLATE_FILE
    return ChatEncoder(ChatTemplate(file.read_text()), tokenizer) if file.exists() else None


def check_model_files(artifact: Artifact, folder: Path) -> None:
    """Check the files that will be loaded, wherever they lie, against the manifest: these, and no others.

    Raises:
        ArtifactError: one is missing, differs, is none of the manifest's, or is a pickle, which runs code when loaded.
    """
    hashes = {
        info.path.removeprefix("model/"): info.sha256
        for info in artifact.manifest.files
        if info.path.startswith("model/")
    }
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(found | set(hashes)):
        path = str(folder / name)
        if name not in hashes:
            raise ArtifactError(path, "surplus", f"must be in the manifest of {artifact.uri}", f"delete {path}")
        if Path(name).suffix in PICKLE_SUFFIXES:
            raise ArtifactError(path, "a pickle", "must be safetensors, JSON or text", "export the model anew")
        sha256 = storage.sha256_file(path) if name in found else "missing"
        if sha256 != hashes[name]:
            allowed = f"must have sha256 {hashes[name][:12]}, as the manifest of {artifact.uri} says"
            raise ArtifactError(path, f"sha256 {sha256[:12]}", allowed, f"delete {folder} or restore it")


def build_application(artifact_uri: str, digest: str, settings: ServeSettings, api_key_hash: str | None) -> Application:
    """Return the Serve application of a model.

    Args:
        digest: of the Endpoint artefact, which `/health` answers with.
        api_key_hash: from `hash_api_key`.
    """
    deployment = serve.deployment(
        ModelReplica,
        name="model",
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"working_dir": NO_WORKING_DIR},
        },
        deployment_actors=[] if settings.api_keys_file is None else [ledger_actor()],
        autoscaling_config=autoscaling_config(settings),
        # The engine refuses what is too much, with OpenAI's error object; Serve's own queue is never used.
        max_ongoing_requests=settings.max_running_requests + settings.max_queued_requests + HEALTH_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        max_surge_percent=settings.max_surge_percent,
        health_check_period_s=5,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
    )
    application: Application = deployment.bind(artifact_uri, digest, settings, api_key_hash)
    return application
