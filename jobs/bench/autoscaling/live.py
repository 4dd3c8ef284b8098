"""Autoscaling on a real Serve on loopback, with a small model that was never trained."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
import ray
import torch
from pydantic import JsonValue
from ray import serve

from ray_ds.artifacts import Artifact, make_digest
from ray_ds.config.model import ModelConfig
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.on_ray.endpoint import deploy, start_proxy
from ray_ds.on_ray.replica import build_application
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import train_bpe

WORDS = ("in", "the", "beginning", "God", "created", "heaven", "and", "earth")
PROMPT_TOKENS, ANSWER_TOKENS = 100, 100
CLIENTS = 2
"""Clients at first; the load is then four times as large."""
PLACES = 4
POLL_S = 0.05
DEADLINE_S = 180.0

Policy = Literal["tokens", "ongoing_requests"]


def make_model(folder: Path, *, seed: int = 3) -> Artifact:
    """Write a model of four layers with random weights, its text as long as is asked for."""
    generator = random.Random(0)
    tokenizer = train_bpe([" ".join(generator.choices(WORDS, k=50)) for _ in range(50)], vocab_size=320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=1024,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        first_k_dense_replace=1,
    )
    decoder = Decoder(config)
    init_weights(decoder, seed=seed)
    with torch.no_grad():  # so that no end-of-text token ends an answer before its length
        decoder.lm_head.weight[list(tokenizer.stop_ids)] = 0.0
    digest = make_digest(["live", seed])
    run = StageRun(
        step="train",
        stage="train",
        stage_version=1,
        kind="Checkpoint",
        run_dir=str(folder),
        uri=f"{folder}/checkpoint/{digest}",
        digest=digest,
        settings={},
        inputs=(),
    )
    model = Path(run.path("model"))
    save_checkpoint_folder(decoder.state_dict(), config, model, dtype=torch.bfloat16, max_shard_bytes=10**9)
    (model / "tokenizer.json").write_text(tokenizer.to_json())
    return run.commit({}, seconds=0.0)


def make_settings(port: int, scaling: AutoscalingSettings, *, places: int = PLACES) -> ServeSettings:
    """Return settings of a replica with few places, so that a laptop can fill it."""
    return ServeSettings(
        port=port,
        max_running_requests=places,
        max_model_len=PROMPT_TOKENS * 2 + ANSWER_TOKENS,
        autoscaling=scaling,
        drain_timeout_s=20.0,
    )


def put_up(model: Artifact, settings: ServeSettings) -> str:
    """Deploy, and return the address."""
    start_proxy(settings, "bench")
    application = build_application(model.uri, model.digest, settings, None)
    return deploy(application, settings, model.digest, lambda state: None)


def num_running(settings: ServeSettings) -> int:
    """Return how many replicas Serve says are running."""
    status = serve.status().applications[settings.app_name]
    return int(status.deployments["model"].replica_states.get("RUNNING", 0))


@dataclass
class Traffic:
    """What clients saw."""

    ttfts_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answers: int = 0
    """Streams that came to their end."""


async def ask(session: aiohttp.ClientSession, url: str, traffic: Traffic, *, max_tokens: int = ANSWER_TOKENS) -> None:
    """Ask for one stream and follow it to its end."""
    prompt = " ".join(random.choices(WORDS, k=PROMPT_TOKENS))
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 1.0, "stream": True}
    started, is_first, is_whole = time.monotonic(), True, False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                traffic.errors.append(f"{response.status}: {(await response.text())[:200]}")
                return
            async for line in response.content:
                data = line.strip().removeprefix(b"data: ")
                if is_first and data:
                    traffic.ttfts_s.append(time.monotonic() - started)
                    is_first = False
                is_whole = is_whole or data == b"[DONE]"
                if data.startswith(b"{") and "error" in json.loads(data):
                    traffic.errors.append(data.decode())
                    return
    except aiohttp.ClientError as error:
        traffic.errors.append(f"{type(error).__name__}: {error}")
        return
    if is_whole:
        traffic.answers += 1
    else:
        traffic.errors.append("the stream broke off")


@contextlib.asynccontextmanager
async def clients(url: str, count: int, traffic: Traffic) -> AsyncIterator[None]:
    """Keep so many clients asking one question after the other; at the end each gets its last answer."""
    is_over = asyncio.Event()

    async def one(session: aiohttp.ClientSession) -> None:
        while not is_over.is_set():
            failed = len(traffic.errors)
            await ask(session, url, traffic)
            if len(traffic.errors) > failed:
                await asyncio.sleep(0.2)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks = [asyncio.create_task(one(session)) for _ in range(count)]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)


async def replicas_seen(url: str, known: set[int]) -> set[int]:
    """Return the replicas that answer, by when they loaded the model; asks once on a fresh connection."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        content = await response.json()
    return known | {int(content["data"][0]["created"])}


async def grow(settings: ServeSettings, url: str) -> dict[str, JsonValue]:
    """Return how long a second replica took to answer once the load was four times as large, and to go again."""
    before, after = Traffic(), Traffic()
    async with clients(url, CLIENTS, before):
        await asyncio.sleep(5.0)
        seen = await replicas_seen(url, set())
        changed = time.monotonic()
        async with clients(url, CLIENTS * 3, after):
            while len(seen) < 2 and time.monotonic() < changed + DEADLINE_S:
                await asyncio.sleep(POLL_S)
                seen = await replicas_seen(url, seen)
            answered_s = time.monotonic() - changed
            await asyncio.sleep(10.0)
    ended = time.monotonic()
    while num_running(settings) > 1 and time.monotonic() < ended + DEADLINE_S:
        await asyncio.sleep(0.25)
    ttfts = sorted(after.ttfts_s)
    return {
        "new_replica_answers_s": answered_s if len(seen) > 1 else None,
        "back_to_minimum_s": time.monotonic() - ended,
        "answers": before.answers + after.answers,
        "errors": list[JsonValue](before.errors + after.errors),
        "ttft_p50_s": ttfts[len(ttfts) // 2],
        "ttft_max_s": ttfts[-1],
    }


async def wake(settings: ServeSettings, url: str) -> dict[str, JsonValue]:
    """Return how long the first token took with no replica there, once the last one has gone."""
    started = time.monotonic()
    while num_running(settings) and time.monotonic() < started + DEADLINE_S:
        await asyncio.sleep(0.25)
    gone_s = time.monotonic() - started
    await asyncio.sleep(2.0)
    traffic = Traffic()
    async with aiohttp.ClientSession() as session:
        await ask(session, url, traffic)
    return {"to_zero_s": gone_s, "zero_to_first_token_s": traffic.ttfts_s[0], "errors": list[JsonValue](traffic.errors)}


def run_live(folder: Path, port: int, policies: tuple[Policy, ...]) -> list[dict[str, JsonValue]]:
    """Return a row of figures for each policy; starts a Ray of its own."""
    model = make_model(folder)
    rows: list[dict[str, JsonValue]] = []
    ray.init(address="local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    try:
        for policy in policies:
            scaling = AutoscalingSettings(max_replicas=2, policy=policy)
            settings = make_settings(port, scaling)
            row = asyncio.run(grow(settings, put_up(model, settings)))
            from_zero = AutoscalingSettings(
                min_replicas=0, max_replicas=2, policy=policy, downscale_delay_s=2.0, downscale_to_zero_delay_s=2.0
            )
            settings = make_settings(port, from_zero)
            rows.append({"policy": policy, **row, **asyncio.run(wake(settings, put_up(model, settings)))})
    finally:
        serve.shutdown()
        ray.shutdown()
    return rows
