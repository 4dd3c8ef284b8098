"""The serve stage on a cluster of one node: a tiny INT8 model, then a tiny checkpoint in its place."""

import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import httpx
import openai
import pytest
import ray
import torch

from ray_ds.artifacts import Artifact, Endpoint, make_digest
from ray_ds.config.model import ModelConfig
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.errors import ArtifactError, ClusterError, ConfigError
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.serve.client import generate, generate_stream, is_endpoint_alive
from ray_ds.stage_run import StageRun
from ray_ds.stages.serve import check_model, serve
from ray_ds.tokenizer import BpeTokenizer, load_tokenizer, train_bpe

pytestmark = pytest.mark.ray

WORDS = ["in", "the", "beginning", "God", "created", "heaven", "起初", "神创造", "it's", "light,", "👍🏽", "1611\n"]
API_KEY = "sk-live-9876543210"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def stage_run(folder: Path, kind: str, name: str, *inputs: Artifact) -> StageRun:
    digest = make_digest([kind, name])
    return StageRun(
        step="serve" if kind == "Endpoint" else kind.lower(),
        stage="serve",
        stage_version=1,
        kind=kind,
        run_dir=str(folder),
        uri=f"{folder}/{kind.lower()}/{digest}",
        digest=digest,
        settings={},
        inputs=inputs,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Artifact:
    run = stage_run(folder, "Checkpoint", "tiny")
    model = Path(run.path("model"))
    generator = random.Random(0)
    tokenizer = train_bpe([" ".join(generator.choices(WORDS, k=50)) for _ in range(50)], vocab_size=320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=96,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    decoder = Decoder(config)
    init_weights(decoder, seed=3)
    with torch.no_grad():  # far apart logits, which rounding does not reorder, and a text that does not end at once
        decoder.lm_head.weight *= 20
    save_checkpoint_folder(decoder.state_dict(), config, model, dtype=torch.bfloat16, max_shard_bytes=10**9)
    (model / "tokenizer.json").write_text(tokenizer.to_json())
    return run.commit({}, seconds=0.0)


@pytest.fixture(scope="module")
def quantized(folder: Path, checkpoint: Artifact) -> Artifact:
    run = stage_run(folder, "QuantizedModel", "tiny", checkpoint)
    quantize_folder(Path(checkpoint.path("model")), Path(run.path("model")), max_shard_bytes=10**9)
    return run.commit({}, seconds=0.0)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[None]:
    shipped = folder / "shipped"
    shipped.mkdir()
    (shipped / "job.txt").write_text("what a job ships")
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=80_000_000,
        include_dashboard=False,
        runtime_env={"working_dir": str(shipped)},
        log_to_driver=False,
    )
    yield
    ray.serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    return ServeSettings(
        model_id="tiny",
        port=free_port(),
        api_key_env="SERVE_TEST_KEY",
        max_running_requests=4,
        max_queued_requests=4,
        autoscaling=AutoscalingSettings(target_utilization=0.5, upscale_delay_s=0.5, downscale_delay_s=1.0),
        deploy_timeout_s=60.0,
        question="In the beginning",
    )


@pytest.fixture(scope="module")
def endpoint(cluster: None, folder: Path, quantized: Artifact, settings: ServeSettings) -> Iterator[Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVE_TEST_KEY", API_KEY)
        yield serve(settings, stage_run(folder, "Endpoint", "int8", quantized))


@pytest.fixture
def client(endpoint: Artifact) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.fact('url')}/v1", api_key=API_KEY, max_retries=0, timeout=30) as client:
        yield client


def tokenizer_of(model: Artifact) -> BpeTokenizer:
    return load_tokenizer(model.path("model", "tokenizer.json"))


def greedy_reference(model: Artifact, prompt: str, num_tokens: int) -> str:
    """Return what the model says token by token without a cache, an engine or a server."""
    decoder, tokenizer = load_quantized(model.path("model")), tokenizer_of(model)
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] in (tokenizer.bos_id, tokenizer.eos_id):
                break
    return tokenizer.decode(tokens[len(prompt_ids) :])


def test_a_port_in_use_is_said_before_serve_starts(
    cluster: None, folder: Path, quantized: Artifact, settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_TEST_KEY", API_KEY)
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", settings.port))
        other_program.listen()
        message = rf"serve.port \(127.0.0.1:{settings.port}\) must be free on the head node \(.*in use.*\)"
        with pytest.raises(ClusterError, match=message):
            serve(settings, stage_run(folder, "Endpoint", "never", quantized))
    assert ray.serve.status().applications == {}


def test_the_artefact_says_where_and_what_and_health_agrees(endpoint: Artifact, quantized: Artifact) -> None:
    assert isinstance(endpoint, Endpoint)
    assert endpoint.fact("model_id") == "tiny" and endpoint.fact("digest") == endpoint.digest
    health = httpx.get(f"{endpoint.fact('url')}/health").json()
    assert health["status"] == "ok" and health["digest"] == endpoint.digest
    assert health["model_digest"] == quantized.digest and health["kind"] == "QuantizedModel"
    assert health["integer_path"] in ("onednn", "onednn_two_pass", "reference")
    assert is_endpoint_alive(endpoint.manifest.facts)


@pytest.mark.shows("The `openai` client works against the endpoint, and a stream gives the text of the whole answer")
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}])
def test_the_openai_client_gets_the_same_text_streamed_and_whole(
    client: openai.OpenAI, quantized: Artifact, sampling: dict[str, float]
) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    request = {"model": "tiny", "prompt": "In the beginning 起初", "max_tokens": 40, **sampling}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    if not sampling["temperature"]:
        assert whole.choices[0].text == greedy_reference(quantized, "In the beginning 起初", 40)


@pytest.mark.shows("An answer with a seed is the same whatever else the model is answering")
def test_answers_among_others_are_those_given_alone(client: openai.OpenAI) -> None:
    def ask(i: int) -> str:
        return (
            client.completions.create(
                model="tiny", prompt=f"{WORDS[i]} God", max_tokens=10 + i, temperature=i % 2, seed=i
            )
            .choices[0]
            .text
        )

    alone = [ask(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def test_errors_come_through_the_proxy_as_the_clients_own(endpoint: Artifact, client: openai.OpenAI) -> None:
    url = f"{endpoint.fact('url')}/v1/completions"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="128"):
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    for body in (b"", b"null", b"{", b'{"prompt": "\\ud800"}', b'{"prompt": 5}'):
        assert httpx.post(url, content=body, headers=headers).status_code == 400
    assert httpx.post(url, content=b"x" * 1_100_000, headers=headers).status_code == 413


def test_a_client_that_leaves_frees_its_slot(endpoint: Artifact, client: openai.OpenAI) -> None:
    def health() -> dict[str, int]:
        content: dict[str, int] = httpx.get(f"{endpoint.fact('url')}/health").json()
        return content

    before = health()["num_tokens"]
    stream = client.completions.create(model="tiny", prompt=["x"] * 8, max_tokens=120, temperature=1, stream=True)
    next(stream)
    stream.close()
    left = time.monotonic()
    while health()["num_running"] + health()["num_waiting"]:
        assert time.monotonic() < left + 3, "still answering"
    assert health()["num_tokens"] - before < 8 * 120 / 2, "the answers went on to their end"


def test_a_replica_has_no_part_of_the_jobs_working_directory(endpoint: Artifact) -> None:
    assert Path.cwd() != Path("/")
    folders = [
        os.readlink(f"/proc/{name}/cwd")
        for name in os.listdir("/proc")
        if name.isdigit() and (Path("/proc") / name / "cmdline").read_bytes().startswith(b"ray::ServeReplica:ray-ds")
    ]
    assert folders and set(folders) == {"/"}


def test_the_command_lines_client_asks_the_endpoint(endpoint: Artifact, quantized: Artifact) -> None:
    url = endpoint.fact("url")
    answer = generate(url, "In the beginning", max_tokens=20, api_key=API_KEY)
    assert answer == greedy_reference(quantized, "In the beginning", 20)
    assert "".join(generate_stream(url, "In the beginning", max_tokens=20, api_key=API_KEY)) == answer


@pytest.mark.shows("The endpoint grows from one replica to two under load")
def test_load_brings_a_second_replica(endpoint: Artifact, client: openai.OpenAI) -> None:
    is_over = threading.Event()

    def load() -> None:
        while not is_over.is_set():
            try:
                client.completions.create(model="tiny", prompt="x", max_tokens=100)
            except openai.RateLimitError:
                time.sleep(0.1)

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(load) for _ in range(6)]
        deadline = time.monotonic() + 45
        while num_replicas() < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        reached = num_replicas()
        is_over.set()
        for one in running:
            one.result()
    assert reached == 2


def num_replicas() -> int:
    status = ray.serve.status().applications["ray-ds"]
    return int(status.deployments["model"].replica_states.get("RUNNING", 0))


def test_a_model_is_replaced_under_the_same_address(
    endpoint: Artifact, folder: Path, checkpoint: Artifact, settings: ServeSettings, client: openai.OpenAI
) -> None:
    new = serve(settings, stage_run(folder, "Endpoint", "bf16", checkpoint))
    assert new.fact("url") == endpoint.fact("url")
    assert is_endpoint_alive(new.manifest.facts) and not is_endpoint_alive(endpoint.manifest.facts)
    health = httpx.get(f"{new.fact('url')}/health").json()
    assert health["kind"] == "Checkpoint" and health["integer_path"] is None
    assert client.completions.create(model="tiny", prompt="x", temperature=0).usage.completion_tokens > 0


def other(settings: ServeSettings, **changes: object) -> ServeSettings:
    return ServeSettings(**{**vars(settings), **changes})


def test_mistakes_are_said_before_anything_is_deployed(
    endpoint: Artifact, folder: Path, quantized: Artifact, settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage_run(folder, "Endpoint", "never", quantized)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"port": free_port()}, ConfigError, r"serve.port \(.*\) must be 127.0.0.1:\d+, where this cluster's proxy"),
        ({"app_name": "second"}, ConfigError, r"serve.route_prefix \(/\) must be none that the application ray-ds"),
        ({"max_model_len": 129}, ConfigError, r"serve.max_model_len \(129\) must be at most 128"),
        ({"cpus_per_replica": 5}, ClusterError, r"serve.autoscaling.min_replicas \(1\) must be at most 0"),
        ({"api_key_env": "NOT_SET"}, ConfigError, r"serve.api_key_env \(NOT_SET\) must name an environment variable"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            serve(other(settings, **changes), run)
    assert set(ray.serve.status().applications) == {"ray-ds"}


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_model_is_refused(cluster: None, folder: Path, checkpoint: Artifact, settings: ServeSettings) -> None:
    run = stage_run(folder, "QuantizedModel", "damaged", checkpoint)
    quantize_folder(Path(checkpoint.path("model")), Path(run.path("model")), max_shard_bytes=10**9)
    damaged = run.commit({}, seconds=0.0)
    flip_last_bit(Path(damaged.path("model", "model.safetensors")))
    with pytest.raises(ArtifactError, match="must have sha256"):
        serve(settings, stage_run(folder, "Endpoint", "damaged", damaged))


def test_a_tokenizer_of_another_model_is_refused(folder: Path, checkpoint: Artifact, settings: ServeSettings) -> None:
    run = stage_run(folder, "Checkpoint", "mixed")
    shutil.copytree(checkpoint.path("model"), run.path("model"))
    config = json.loads(Path(run.path("model", "config.json")).read_text())
    Path(run.path("model", "config.json")).write_text(json.dumps({**config, "vocab_size": 300}))
    message = (
        r"tokenizer.json \(\d+ tokens\) must have at most the 300 tokens that the model knows; make the model anew"
    )
    with pytest.raises(ArtifactError, match=message):
        check_model(settings, run.commit({}, seconds=0.0), "serve")


def test_a_replica_that_cannot_start_ends_the_step_with_its_reason(
    endpoint: Artifact, folder: Path, checkpoint: Artifact, settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage_run(folder, "Checkpoint", "damaged")
    shutil.copytree(checkpoint.path("model"), run.path("model"))
    damaged = run.commit({}, seconds=0.0)
    flip_last_bit(Path(damaged.path("model", "model.safetensors")))
    monkeypatch.setattr(type(damaged), "verify_files", lambda self: None)  # as if damaged after the driver looked
    message = r"application broken \(DEPLOY_FAILED: .*must have sha256.*\) must start; mend what it says"
    with pytest.raises(ClusterError, match=message):
        changes = {"app_name": "broken", "route_prefix": "/broken"}
        serve(other(settings, **changes), stage_run(folder, "Endpoint", "broken", damaged))
    assert ray.serve.status().applications["ray-ds"].status == "RUNNING"


def test_an_endpoint_that_is_not_there_in_time_is_an_error(
    endpoint: Artifact, folder: Path, quantized: Artifact, settings: ServeSettings
) -> None:
    changes = {"app_name": "late", "route_prefix": "/late", "deploy_timeout_s": 0.001}
    with pytest.raises(ClusterError, match=r"must answer within deploy_timeout_s \(0.001\); see `serve status`"):
        serve(other(settings, **changes), stage_run(folder, "Endpoint", "late", quantized))
