"""One replica behind Ray Serve on a Ray of its own: its time to first token, and what it does under overload."""

import asyncio
import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import ray
import torch
from pydantic import JsonValue
from ray import serve

from jobs.bench.autoscaling.live import make_model
from jobs.bench.serving.first_token import measure_first_tokens
from jobs.bench.serving.load import Question
from jobs.bench.serving.overload import measure_overload
from ray_ds.artifacts import Artifact
from ray_ds.config.safety import SafetySettings
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.on_ray.endpoint import deploy, start_proxy
from ray_ds.on_ray.replica import build_application
from ray_ds.serve.build import build_engine
from ray_ds.serve.engine import Engine
from ray_ds.serve.keys import hash_api_key
from ray_ds.serve.load import load_served_model
from ray_ds.tokenizer import load_tokenizer

Ingress = Literal["proxy", "haproxy"]

PROMPT_TOKENS, ANSWER_TOKENS = 100, 100
FEW_TOKENS = 8
"""Of an answer whose first token is timed: the engine goes on while that one is on its way."""
PLACES = QUEUE = 4
TARGET_TTFT_S = 2.0
KEY_VARIABLE = "RAY_DS_BENCH_KEY"


def measure_front(ingress: Ingress, *, requests: int, seconds: float) -> dict[str, JsonValue]:
    """Return the figures of both measurements; starts a Ray of its own.

    Args:
        ingress: `haproxy` listens on all addresses, with a key of its own, and wants `RAY_SERVE_ENABLE_HA_PROXY=1`
            before ray is imported.
        requests: whose times to first token are counted.
        seconds: of each of the two loads.
    """
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder, contextlib.ExitStack() as stack:
        model = make_model(Path(folder))
        settings = make_settings(ingress, free_port())
        key = secrets.token_urlsafe(24)
        engine = stack.enter_context(bare_engine(model, settings))
        url = stack.enter_context(endpoint(model, settings, key))
        few = Question(
            url=url,
            headers={"Authorization": f"Bearer {key}"},
            vocab_size=load_tokenizer(f"{model.path('model')}/tokenizer.json").vocab_size,
            prompt_tokens=PROMPT_TOKENS,
            answer_tokens=FEW_TOKENS,
        )
        first_token = asyncio.run(measure_first_tokens(few, engine, requests=requests))
        overload = asyncio.run(
            measure_overload(
                replace(few, answer_tokens=ANSWER_TOKENS),
                num_places=PLACES,
                num_queued=QUEUE,
                seconds=seconds,
                target_ttft_s=TARGET_TTFT_S,
            )
        )
    return {"first_token": dict[str, JsonValue](first_token), "overload": overload}


def make_settings(ingress: Ingress, port: int) -> ServeSettings:
    """Return settings of one replica with few places, so that a laptop can fill it."""
    is_open = ingress == "haproxy"
    return ServeSettings(
        host="0.0.0.0" if is_open else "127.0.0.1",
        port=port,
        ingress=ingress,
        api_key_env=KEY_VARIABLE,
        max_running_requests=PLACES,
        max_queued_requests=QUEUE,
        max_model_len=PROMPT_TOKENS + ANSWER_TOKENS,
        safety=SafetySettings(scope="off"),
        autoscaling=AutoscalingSettings(min_replicas=1, max_replicas=1),
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def bare_engine(model: Artifact, settings: ServeSettings) -> Iterator[Engine]:
    """Give an engine in this process as a replica builds it."""
    torch.set_num_threads(settings.cpus_per_replica)
    folder = Path(model.path("model"))
    device = torch.device("cpu")
    decoder = load_served_model(folder, is_quantized=False, device=device, dtype=torch.float32).decoder
    engine = build_engine(decoder, load_tokenizer(str(folder / "tokenizer.json")), settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def endpoint(model: Artifact, settings: ServeSettings, key: str) -> Iterator[str]:
    """Give the address of a replica behind Serve, on a Ray of its own."""
    os.environ[KEY_VARIABLE] = key
    ray.init(address="local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    try:
        start_proxy(settings, "bench")
        application = build_application(model.uri, model.digest, settings, hash_api_key(key))
        yield deploy(application, settings, model.digest, lambda state: None)
    finally:
        serve.shutdown()
        ray.shutdown()
