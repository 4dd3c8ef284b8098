"""A local cluster as `make up` starts it, and a small recipe run on it once for all tests here."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ds.data.sample_text import king_james_chapters

PROJECT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
SOAK_RESULTS = PROJECT / "tests/end_to_end/soak_results"

RECIPE = """
name = "mini"
run_dir = "runs/mini"

[[step]]
stage = "clean"
settings.unit_bytes = 65536
[[step.settings.inputs]]
glob = "text/*.jsonl*"
id_column = "id"
source = "test"
licence = "CC0-1.0"

[[step]]
stage = "tokenizer"
settings.vocab_size = 512

[[step]]
stage = "tokenize"
settings.validation_fraction = 0.2

[[step]]
stage = "train"
[step.settings]
seq_len = 128
batch_tokens = 1024
micro_batch = 4
steps = 12
gradient_clipping = 0.0
num_workers = 2
checkpoint_every = 5
model = { preset = "tiny" }
optimizer = { kind = "muon", lr = 0.02 }
schedule = { warmup_steps = 2 }

[[step]]
stage = "evaluate"
settings.seq_len = 128

[[step]]
stage = "quantize"
settings.gate_tokens = 2048
settings.max_perplexity_ratio = 1.05
settings.min_top1_agreement = 0.8

[[step]]
stage = "serve"
settings.port = PORT
settings.model_id = "mini"
settings.question = "And God said"
"""


@dataclass(frozen=True)
class Site:
    """A folder with `jobs/` and a recipe, and the environment of a cluster."""

    folder: Path
    environment: Mapping[str, str]
    port: int

    def run(self, *command: str, timeout_s: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the site, as in a shell that sourced the cluster's environment."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def ray_ds(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray-ds`."""
        return self.run(str(BIN / "ray-ds"), *arguments)


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_text(folder: Path) -> None:
    """Write 300 chapters of the King James text."""
    folder.mkdir()
    records = [json.dumps(record) for record in list(king_james_chapters())[:300]]
    with gzip.open(folder / "kjv.jsonl.gz", "wt") as file:
        file.write("\n".join(records) + "\n")


def read_environment(file: Path) -> dict[str, str]:
    """Return the environment of this process with what a cluster's `env` file exports."""
    lines = [line.removeprefix("export ").split("=", 1) for line in file.read_text().splitlines()]
    base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**base, "PATH": f"{BIN}:{os.environ['PATH']}", **{key: value for key, value in lines}}


def start_cluster(state: Path, ports: Sequence[int], **settings: str) -> dict[str, str]:
    """Start the local cluster with its own state folder, ports and settings; return the environment of its clients."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **base,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_DS_CLUSTER_DIR": str(state),
        "RAY_DS_GCS_PORT": str(ports[0]),
        "RAY_DS_DASHBOARD_PORT": str(ports[1]),
        **settings,
    }
    subprocess.run(
        [PROJECT / "cluster/local/up.sh"], env=environment, check=True, timeout=240, capture_output=True, text=True
    )
    return {**read_environment(state / "env"), "RAY_DS_CLUSTER_DIR": str(state)}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PROJECT / "jobs", folder / "jobs")
    shutil.copy(PROJECT / ".rayignore", folder)
    write_text(folder / "text")
    *cluster_ports, port = free_ports(3)
    (folder / "jobs/recipes/mini.toml").write_text(RECIPE.replace("PORT", str(port)))
    try:
        environment = start_cluster(folder / "cluster", cluster_ports)
        yield Site(folder=folder, environment=environment, port=port)
    finally:
        down = {**os.environ, "RAY_DS_CLUSTER_DIR": str(folder / "cluster")}
        subprocess.run(
            [PROJECT / "cluster/local/down.sh"], env=down, check=True, timeout=120, stdout=subprocess.DEVNULL
        )


@pytest.fixture(scope="session")
def finished(site: Site) -> subprocess.CompletedProcess[str]:
    """The recipe run once, from text to endpoint."""
    result = site.ray_ds("run", "jobs/recipes/mini.toml")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result
