"""The whole road on a local cluster of three nodes: text in, answers out, and what a person sees on the way."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import openai
import pytest

from tests.end_to_end.conftest import BIN, Site

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = "jobs/recipes/mini.toml"
Finished = subprocess.CompletedProcess[str]


@pytest.mark.shows("One command takes raw text to an answer of the served INT8 model, on three nodes")
def test_the_recipe_runs_to_an_answer(site: Site, finished: Finished) -> None:
    summary = json.loads((site.folder / "runs/mini/summary.json").read_text())
    documents = summary["documents"]
    assert documents["in"] == documents["kept"] + documents["dropped"] + documents["quarantined"] == 300
    assert summary["tokens"]["train"] > summary["tokens"]["validation"] > 0
    assert summary["steps"] == 12
    assert summary["parameters"] > 0 and summary["tokens_per_s"] > 0
    for name in ("validation", "xz", "unigram", "bigram"):
        assert 0 < summary[f"{name}_bits_per_byte"] < 8
    assert 0.9 < summary["int8_perplexity_ratio"] < 1.05
    assert 0 < summary["int8_size_ratio"] < 1
    assert set(summary["step_seconds"]) == {"clean", "tokenizer", "tokenize", "train", "evaluate", "quantize", "serve"}
    assert summary["endpoint"] == f"http://127.0.0.1:{site.port}"
    assert summary["question"] == "And God said" and summary["answer"]
    for key in ("validation bits per byte", "answer", "endpoint"):
        assert key in finished.stdout
    assert "progress step=train" in finished.stdout


def test_a_second_run_skips_everything(site: Site, finished: Finished) -> None:
    again = site.ray_ds("run", RECIPE)
    assert again.returncode == 0
    assert again.stdout.count(" skipped ") == 7 and " submitted " not in again.stdout


def test_a_changed_setting_reruns_only_what_it_reaches(site: Site, finished: Finished) -> None:
    changed = site.ray_ds("run", RECIPE, "--evaluate.max_tokens=2048")
    assert changed.returncode == 0, changed.stdout[-3000:]
    assert changed.stdout.count(" submitted ") == 1 and "submitted step=evaluate" in changed.stdout


def test_status_shows_every_step_finished(site: Site, finished: Finished) -> None:
    lines = site.ray_ds("status", RECIPE).stdout.splitlines()
    assert len(lines) == 8 and all("finished" in line for line in lines[1:])


@pytest.mark.shows("`ray-ds trace` leads from the endpoint back to the input files")
def test_trace_leads_from_the_endpoint_to_the_text(site: Site, finished: Finished) -> None:
    summary = json.loads((site.folder / "runs/mini/summary.json").read_text())
    trace = site.ray_ds("trace", summary["artefacts"]["serve"])
    assert trace.returncode == 0, trace.stderr
    kinds = [line.split()[0] for line in trace.stdout.splitlines()]
    assert kinds[:3] == ["Endpoint", "QuantizedModel", "Checkpoint"] and {"TokenShards", "Tokenizer", "Corpus"} <= set(
        kinds
    )
    assert f"{site.folder}/text/kjv.jsonl.gz" in trace.stdout and "test; CC0-1.0" in trace.stdout


def test_the_openai_client_gets_the_same_answer_streamed_or_not(site: Site, finished: Finished) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["mini"]
    request = {
        "model": "mini",
        "prompt": "And the LORD spake unto Moses",
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 7,
    }
    whole = client.completions.create(**request)
    streamed = client.completions.create(**request, stream=True)
    text = "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].text != ""


def test_generate_asks_the_endpoint(site: Site, finished: Finished) -> None:
    result = site.ray_ds("generate", "And God said", "--url", f"http://127.0.0.1:{site.port}", "--max-tokens", "8")
    assert result.returncode == 0 and result.stdout.strip()


def test_generate_without_an_endpoint_is_a_clear_error(site: Site) -> None:
    result = site.ray_ds("generate", "x", "--url", "http://127.0.0.1:9")
    assert result.returncode == 2 and "http://127.0.0.1:9" in result.stderr and "must" in result.stderr


def test_ray_job_submit_runs_a_stage(site: Site, finished: Finished) -> None:
    command = ["--working-dir", ".", "--", "python", "-m", "jobs.clean_text", "--recipe", RECIPE]
    result = site.run(str(BIN / "ray"), "job", "submit", *command, "--root", str(site.folder))
    assert result.returncode == 0 and "skipped step=clean reason=finished" in result.stdout


def test_a_job_refuses_relative_paths(site: Site) -> None:
    command = ["--working-dir", ".", "--", "python", "-m", "jobs.clean_text", "--recipe", RECIPE]
    result = site.run(str(BIN / "ray"), "job", "submit", *command)
    assert result.returncode == 1
    assert "run_dir (runs/mini) must be absolute, because a job's working directory is a copy" in result.stdout


def test_more_workers_than_the_cluster_holds(site: Site, finished: Finished) -> None:
    result = site.ray_ds("submit", "train", RECIPE, "--train.num_workers=8", "--train.batch_tokens=4096")
    assert result.returncode == 2, result.stdout[-3000:]
    assert "train.num_workers (8) must be at most 5, what the cluster's nodes hold at 1 CPU a worker" in result.stdout


@pytest.mark.shows("Mistakes in a recipe are named in four parts and exit with 2 before anything starts")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "train", RECIPE, "--train.stepz=3"], r"train.stepz (3) must be one of the known settings"),
        (
            ["submit", "train", RECIPE, "--train.batch_tokens=500"],
            "batch_tokens (500) must be a multiple of micro_batch",
        ),
        (["submit", "train", "absent.toml"], "recipe (absent.toml) must be a TOML file"),
        (["submit", "nothing", RECIPE], "steps of stage nothing (none) must be exactly one"),
        (["run", RECIPE, "--clean.inputs=[]"], "inputs (empty) must hold one table of files or more"),
        (["trace", "/absent"], "/absent (no manifest) must be a finished"),
    ],
)
def test_mistakes_exit_with_2_before_anything_starts(site: Site, arguments: list[str], message: str) -> None:
    result = site.ray_ds(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert " submitted " not in result.stdout


def test_a_port_in_use_is_found_before_anything_starts(site: Site, finished: Finished) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = site.ray_ds("run", RECIPE, f"--serve.port={port}")
    assert result.returncode == 2
    assert f"serve.port ({port}) must be free on 127.0.0.1, or Ray Serve's; stop the program" in result.stderr


def test_an_artefact_of_another_recipe(site: Site, finished: Finished) -> None:
    summary = json.loads((site.folder / "runs/mini/summary.json").read_text())
    other = site.folder / "runs/mini/tokenizer/fedcba9876543210"
    shutil.copytree(summary["artefacts"]["tokenizer"], other)
    result = site.ray_ds("trace", str(other))
    assert result.returncode == 2 and "it is an artefact of another recipe; put it back" in result.stderr


def test_a_damaged_checkpoint(site: Site, finished: Finished) -> None:
    summary = json.loads((site.folder / "runs/mini/summary.json").read_text())
    weights = Path(summary["artefacts"]["train"]) / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        result = site.ray_ds("submit", "quantize", RECIPE, "--quantize.gate_tokens=1024")
        assert result.returncode == 2
        assert "model.safetensors (sha256" in result.stdout and "as its manifest says; restore it" in result.stdout
    finally:
        weights.write_bytes(whole)


def test_missing_and_empty_input(site: Site) -> None:
    inputs = '--clean.inputs=[{glob = "GLOB", source = "s", licence = "l"}]'
    missing = site.ray_ds("run", RECIPE, inputs.replace("GLOB", "absent/*.jsonl"))
    assert missing.returncode == 2 and f"{site.folder}/absent/*.jsonl" in missing.stderr
    (site.folder / "empty.jsonl").touch()
    empty = site.ray_ds("run", RECIPE, inputs.replace("GLOB", "empty.jsonl"))
    assert empty.returncode == 2 and "empty" in empty.stderr


def test_a_damaged_artefact_stops_what_follows_and_is_not_overwritten(site: Site, finished: Finished) -> None:
    summary = json.loads((site.folder / "runs/mini/summary.json").read_text())
    manifest = Path(summary["artefacts"]["tokenizer"]) / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:100])
    try:
        result = site.ray_ds("run", RECIPE)
        assert result.returncode == 2
        assert (
            f"{manifest} (100 bytes) must be a manifest" in result.stderr and "; restore it, or delete" in result.stderr
        )
        assert manifest.read_text() == whole[:100]
    finally:
        manifest.write_text(whole)


def test_a_client_without_the_token_is_refused(site: Site, tmp_path: Path) -> None:
    result = site.run(
        str(BIN / "ray-ds"), "submit", "clean", RECIPE, "--clean.mask_pii=false", RAY_AUTH_MODE="disabled"
    )
    assert result.returncode == 2 and "must name the token of the cluster" in result.stderr
