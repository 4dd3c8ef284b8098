"""What KubeRay does with a RayService, done by hand: its `serveConfigV2` is put to a dashboard, and then answers."""

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
import torch
import yaml

from ray_ds.artifacts import Artifact
from ray_ds.errors import ClusterError
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.serve.client import generate, read_health
from ray_ds.tokenizer import train_bpe
from tests.cluster.cluster_files import CLUSTER, PROJECT, resources
from tests.cluster.ray_processes import RayProcesses, eventually, free_port
from tests.quantize.tiny_models import config_of
from tests.stages.small_artifacts import WORDS, stage_run

API_KEY = "key-of-the-test"


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    """A tiny checkpoint."""
    run = stage_run(tmp_path, "Checkpoint")
    tokenizer = train_bpe([" ".join(WORDS)] * 20, vocab_size=300)
    config = config_of("moe", vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    decoder = Decoder(config)
    init_weights(decoder, seed=3)
    folder = Path(run.path("model"))
    save_checkpoint_folder(decoder.state_dict(), config, folder, dtype=torch.float32, max_shard_bytes=10**9)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return run.commit({}, seconds=0.0)


@pytest.fixture
def cluster() -> Iterator[RayProcesses]:
    """A head that has the package and, in its environment, the key."""
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(PROJECT), "RAY_DS_API_KEY": API_KEY}
    with tempfile.TemporaryDirectory(prefix="serve") as folder:
        nodes = RayProcesses(Path(folder), environment)
        try:
            nodes.start_head(num_cpus=2)
            yield nodes
        finally:
            nodes.stop()


def serve_config(artifact: Artifact, port: int) -> dict[str, Any]:
    """Return the file's configuration for this artefact on a CPU and a free port."""
    (resource,) = resources(CLUSTER / "kuberay" / "rayservice.yaml")
    config: dict[str, Any] = yaml.safe_load(resource["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"]["artifact"] = artifact.uri
    on_cpu = {"precision": "fp32", "cpus_per_replica": 1, "gpus_per_replica": 0.0, "port": port}
    application["args"]["settings"] |= on_cpu | {"autoscaling": {"min_replicas": 1, "max_replicas": 1}}
    return config


def put(url: str, content: dict[str, Any]) -> bool:
    """Send JSON, and tell whether somebody took it."""
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="PUT"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    except urllib.error.URLError:
        return False


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("The RayService's configuration, put to a cluster, serves a checkpoint to those who have the key")
def test_the_configuration_serves_a_model(cluster: RayProcesses, model: Artifact) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{cluster.dashboard_port}/api/serve/applications/"
    eventually("the dashboard takes it", lambda: put(address, serve_config(model, port)), timeout_s=90)
    url = f"http://127.0.0.1:{port}"
    health = eventually("the endpoint is healthy", lambda: read_health(url), timeout_s=120)
    assert health["digest"] == model.digest and health["kind"] == "Checkpoint"
    assert generate(url, "in the beginning", max_tokens=4, temperature=1.0, seed=7, api_key=API_KEY)
    with pytest.raises(ClusterError, match=r"401: missing or wrong API key"):
        generate(url, "in the beginning", max_tokens=4)
