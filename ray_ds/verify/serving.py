"""Serving: the tiny model behind an address, an answer, a second replica under load, and all of it gone again."""

import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from pydantic import JsonValue
from ray import serve

from ray_ds import storage
from ray_ds.artifacts import Checkpoint
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.errors import ClusterError
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.on_ray.endpoint import deploy, head_node, proxy_address, start_proxy
from ray_ds.on_ray.nodes import usable_nodes
from ray_ds.on_ray.replica import build_application
from ray_ds.on_ray.sizing import room
from ray_ds.serve.client import generate
from ray_ds.serve.keys import hash_api_key
from ray_ds.train.export import export_model
from ray_ds.train.task import TrainTask
from ray_ds.verify.context import Context
from ray_ds.verify.finding import Finding, Problem, judged, not_applicable
from ray_ds.verify.made_up import commit_model, make_run, write_shards
from ray_ds.verify.tiny_training import SETTINGS

NAME = "serving"
APP = "ray-ds-verify"
KEY_ENV = "RAY_DS_VERIFY_API_KEY"
"""Names the key where the settings want a name; the key itself is random and passed on as it is."""
GPU_SHARE = 0.25
DEPLOY_TIMEOUT_S = 80.0
SCALE_TIMEOUT_S = 60.0
CLIENTS = 6
PROMPT = "水"
SHORT_TOKENS = 8
LONG_TOKENS = 64
POLL_S = 0.5


def check_serving(context: Context) -> Finding:
    """Deploy, ask, load and remove a model."""
    if ray.get_runtime_context().get_node_id() != head_node()["NodeID"]:
        return not_applicable(NAME, "this job's driver is not on the head node, on whose loopback the endpoint listens")
    need = {"CPU": 1.0, **({"GPU": GPU_SHARE} if context.gpus else {})}
    free = room(usable_nodes(need, {}, 2))
    if not free:
        return not_applicable(NAME, "no CPU (or GPU) is free for a replica; run it again when the cluster is idle")
    model = context.made.model or initial_model(context)
    settings = make_settings(context)
    key = secrets.token_urlsafe(24)
    started = time.monotonic()
    was_up = proxy_address() is not None
    context.clean_up.add(lambda: remove(was_up))
    start_proxy(settings, NAME)
    application = build_application(model.uri, model.digest, settings, hash_api_key(key))
    url = deploy(application, settings, model.digest, lambda state: None)
    deploy_s = time.monotonic() - started
    started = time.monotonic()
    generate(url, PROMPT, max_tokens=SHORT_TOKENS, api_key=key)
    figures: dict[str, JsonValue] = {"deploy_s": deploy_s, "first_answer_s": time.monotonic() - started}
    if free < 2:
        return judged(NAME, figures, [], ["there is room for one replica only: scaling to two was not tried"])
    load = Load(url=url, key=key)
    context.clean_up.add(load.stop.set)
    scale_s = _drive(load)
    return judged(NAME, {**figures, **load.figures(scale_s)}, judge_load(load, scale_s))


def make_settings(context: Context) -> ServeSettings:
    """Return settings for the cluster's proxy, or for one on a free port of the head's loopback."""
    host, port = proxy_address() or ("127.0.0.1", free_port())
    return ServeSettings(
        model_id="verify",
        app_name=APP,
        route_prefix=f"/{APP}",
        host=host,
        port=port,
        api_key_env=KEY_ENV,
        max_running_requests=2,
        gpus_per_replica=GPU_SHARE if context.gpus else 0.0,
        autoscaling=AutoscalingSettings(
            min_replicas=1, max_replicas=2, target_utilization=0.5, upscale_delay_s=0.0, downscale_delay_s=600.0
        ),
        drain_timeout_s=2.0,
        deploy_timeout_s=DEPLOY_TIMEOUT_S,
    )


def free_port() -> int:
    """Return a port of this node's loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def initial_model(context: Context) -> Checkpoint:
    """Return a model that was never trained, for when the training check did not leave one."""
    shards = context.work(NAME, "shards")
    vocab_size = write_shards(shards)
    settings = decode_settings(TrainSettings, SETTINGS, where="verify")
    run = make_run(context.work(NAME), "train", settings, run_dir=context.run_dir)
    config = settings.new_model(vocab_size)
    task = TrainTask(
        settings=settings,
        config=config,
        shards=shards,
        checkpoints=run.work_path("checkpoints"),
        output=run.uri,
        bos_token_id=0,
        eos_token_id=1,
        device="cpu",
    )
    decoder = Decoder(config)
    init_weights(decoder, settings.seed)
    if not storage.is_remote(run.uri):
        storage.local_path(run.uri).mkdir(parents=True, exist_ok=True)
    export_model(decoder.state_dict(), task, torch.float32)
    return commit_model(run, settings)


@dataclass(kw_only=True)
class Load:
    """Clients that ask one question after the other until told to stop."""

    url: str
    key: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: int = 0
    errors: list[str] = field(default_factory=list)

    def start(self) -> list[threading.Thread]:
        """Start the clients."""
        threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        return threads

    def _ask(self) -> None:
        while not self.stop.is_set():
            try:
                generate(self.url, PROMPT, max_tokens=LONG_TOKENS, api_key=self.key)
                self.answers += 1
            except ClusterError as error:
                self.errors.append(str(error))
                self.stop.wait(POLL_S)

    def figures(self, scale_s: float | None) -> Mapping[str, JsonValue]:
        """Return what was measured."""
        return {"answers": self.answers, "errors": len(self.errors), "one_to_two_replicas_s": scale_s}


def _drive(load: Load) -> float | None:
    """Ask until a second replica runs; return how long that took, None for too long."""
    threads = load.start()
    started = time.monotonic()
    scale_s = None
    while time.monotonic() < started + SCALE_TIMEOUT_S:
        if _running_replicas() >= 2:
            scale_s = time.monotonic() - started
            break
        time.sleep(POLL_S)
    load.stop.set()
    for thread in threads:
        thread.join(10.0)
    return scale_s


def _running_replicas() -> int:
    """Return how many replicas of the model answer."""
    application: Any = serve.status().applications.get(APP)
    if application is None:
        return 0
    return sum(int(deployment.replica_states.get("RUNNING", 0)) for deployment in application.deployments.values())


def judge_load(load: Load, scale_s: float | None) -> list[Problem]:
    """Return what went wrong under load."""
    problems = []
    if load.errors:
        wrong = f"{len(load.errors)} of {load.answers + len(load.errors)} requests failed: {load.errors[0]}"
        problems.append(Problem(wrong=wrong, action="see the replicas' logs (`serve status`, `ray logs`)"))
    if scale_s is None:
        wrong = f"no second replica within {SCALE_TIMEOUT_S:g} s of {CLIENTS} requests at a time, though there was room"
        action = "see `serve status` and the Serve controller's log; a replica must import ray_ds on every node"
        problems.append(Problem(wrong=wrong, action=action))
    return problems


def remove(was_up: bool) -> None:
    """Take the application away, and Serve itself where it came with it and serves nothing else."""
    if proxy_address() is None:
        return
    serve.delete(APP)
    if not was_up and not serve.status().applications:
        serve.shutdown()
