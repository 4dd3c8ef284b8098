"""A whole recipe, from text to answer, whose files are all on an object store."""

import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray
from ray import serve

from ray_ds import storage
from ray_ds.data.sample_text import king_james_chapters
from ray_ds.job import run_step
from ray_ds.recipe import load_recipe
from ray_ds.report import summary_lines, trace_lines, write_summary
from ray_ds.steps import find_finished
from tests.object_store.conftest import free_ports

RECIPE = """
name = "mini"
run_dir = "FOLDER/runs/mini"

[[step]]
stage = "clean"
[[step.settings.inputs]]
glob = "FOLDER/text/*.jsonl.gz"
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
seq_len = 64
batch_tokens = 512
micro_batch = 4
steps = 6
num_workers = 2
checkpoint_every = 3
model = { preset = "tiny" }
schedule = { warmup_steps = 2 }

[[step]]
stage = "evaluate"
settings.seq_len = 64
settings.max_tokens = 2048

[[step]]
stage = "quantize"
settings.gate_tokens = 1024
settings.max_perplexity_ratio = 1.05
settings.min_top1_agreement = 0.8

[[step]]
stage = "serve"
settings.port = PORT
settings.question = "And God said"
"""
KINDS = ["Corpus", "Tokenizer", "TokenShards", "Checkpoint", "EvalReport", "QuantizedModel", "Endpoint"]


@pytest.fixture
def cluster(server: object) -> Iterator[None]:
    """A cluster whose processes have the store's address and key in their environment."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=4, object_store_memory=150_000_000, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("Every stage of a recipe works with its text and its run directory on an S3-compatible store")
def test_a_recipe_runs_with_everything_on_the_store(cluster: None, folder: str, tmp_path: Path) -> None:
    chapters = list(king_james_chapters())[:120]
    text = gzip.compress("".join(json.dumps(chapter) + "\n" for chapter in chapters).encode())
    storage.write_bytes(f"{folder}/text/kjv.jsonl.gz", text)
    file = tmp_path / "mini.toml"
    file.write_text(RECIPE.replace("FOLDER", folder).replace("PORT", str(free_ports(1)[0])))
    recipe = load_recipe(str(file), overrides=[], root=str(tmp_path))
    for step in recipe.steps:
        run_step(recipe, step)
    made = [find_finished(recipe, step) for step in recipe.steps]
    assert [artifact.kind for artifact in made if artifact is not None] == KINDS
    for artifact in made:
        assert artifact is not None and artifact.uri.startswith(f"{folder}/runs/mini/")
        artifact.verify_files()
    summary = write_summary(recipe)
    assert summary["documents"]["in"] == 120 and summary["steps"] == 6
    assert summary["answer"] and any("int8 perplexity ratio" in line for line in summary_lines(recipe, summary))
    assert made[-1] is not None and f"{folder}/text/kjv.jsonl.gz" in "\n".join(trace_lines(made[-1].uri))
    left = [entry.path for entry in storage.list_files(f"{folder}/runs/mini")]
    assert not [path for path in left if path.endswith("lease.json") or "/checkpoints/" in path]
    assert os.listdir(tmp_path) == ["mini.toml"]
