"""The serve stage: QuantizedModel or Checkpoint -> Endpoint, an application of Ray Serve that outlives the job."""

import json
import os
import time
from pathlib import Path

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel
from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.logs import Progress, log_event
from ray_ds.model.hugging_face import from_hf_config
from ray_ds.on_ray.endpoint import check_route, deploy, start_proxy
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.replica import build_application
from ray_ds.serve.client import ask
from ray_ds.serve.keys import hash_api_key, read_keys
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import load_tokenizer

QUESTION_TOKENS = 32


def serve(settings: ServeSettings, run: StageRun) -> Artifact:
    """Put a model behind an address, replacing the one before, and ask it a question."""
    started = time.monotonic()
    model = run.input(QuantizedModel, Checkpoint)
    model.verify_files()
    check_model(settings, model, run.step)
    api_key = find_api_key(settings, run.step)
    check_keys_file(settings, run.step)
    check_cluster(
        run.run_dir,
        num_workers=max(1, settings.autoscaling.min_replicas),
        cpus_per_worker=settings.cpus_per_replica,
        gpus_per_worker=settings.gpus_per_replica,
        field=f"{run.step}.autoscaling.min_replicas",
    )
    start_proxy(settings, run.step)
    check_route(settings, run.step)
    progress = Progress(run.step, 2)
    api_key_hash = None if api_key is None else hash_api_key(api_key)
    application = build_application(model.uri, run.digest, settings, api_key_hash)
    url = deploy(application, settings, run.digest, lambda state: progress.update(0, state=state))
    progress.update(1, url=url)
    answer = ask(url, settings.question, max_tokens=QUESTION_TOKENS, api_key=api_key, model=settings.model_id)
    log_event("endpoint_answers", url=url, question=settings.question, answer=answer)
    progress.update(2, url=url)
    facts = {"url": url, "model_id": settings.model_id, "digest": run.digest}
    return run.commit(facts, seconds=time.monotonic() - started)


def check_model(settings: ServeSettings, model: Artifact, step: str) -> None:
    """Refuse more tokens than the model was made for, and a tokenizer that is not the model's.

    Raises:
        ConfigError: `max_model_len` is too large.
        ArtifactError: the tokenizer has ids that the model does not know.
    """
    config = from_hf_config(json.loads(storage.read_bytes(model.path("model", "config.json"))))
    longest = config.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        allowed = f"must be at most {longest}, what the model was made for"
        raise ConfigError(f"{step}.max_model_len", settings.max_model_len, allowed, "lower it or leave it out")
    uri = model.path("model", "tokenizer.json")
    num_tokens = load_tokenizer(uri).vocab_size
    if num_tokens > config.vocab_size:
        allowed = f"must have at most the {config.vocab_size} tokens that the model knows"
        raise ArtifactError(
            uri, f"{num_tokens} tokens", allowed, "make the model anew; its files do not belong together"
        )


def check_keys_file(settings: ServeSettings, step: str) -> None:
    """Refuse a file of API keys that is not there or damaged, before replicas fail on it.

    Raises:
        ConfigError: it has no key, or a line is wrong.
        InputError: it cannot be read.
    """
    if settings.api_keys_file is not None and not read_keys(Path(settings.api_keys_file)):
        allowed = "must hold a key, on every node"
        action = "make one with `ray-ds keys new NAME --file FILE`"
        raise ConfigError(f"{step}.api_keys_file", settings.api_keys_file, allowed, action)


def find_api_key(settings: ServeSettings, step: str) -> str | None:
    """Return the API key from this job's environment, or None where none is wanted.

    Raises:
        ConfigError: the variable is not set.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        allowed = "must name an environment variable of the job that holds the key"
        action = f"set {settings.api_key_env} where the cluster's head is started, or in the job's runtime environment"
        raise ConfigError(f"{step}.api_key_env", settings.api_key_env, allowed, action)
    return key
