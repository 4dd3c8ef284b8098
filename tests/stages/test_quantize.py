"""The quantize stage, its task alone and on a cluster of one node."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel, TokenShards, find_artifact
from ray_ds.config.quantize import QuantizeSettings
from ray_ds.data.shard_file import write_shard
from ray_ds.errors import ArtifactError, ClusterError, InputError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.stage_run import StageRun
from ray_ds.stages.quantize import QuantizeJob, check_gate, quantize, quantize_and_measure
from tests.quantize.tiny_models import SEQ_LEN, make_tokens, plant_outliers, trained_state, write_checkpoint
from tests.stages.small_artifacts import stage_run

SETTINGS = QuantizeSettings(gate_tokens=2048, device="cpu")


def make_shards(folder: Path, *, tokenizer: str = "t0", num_rows: int = 100) -> TokenShards:
    run = stage_run(folder, "TokenShards", name=f"{tokenizer} {num_rows}")
    tokens = make_tokens(1, max(num_rows * SEQ_LEN, 1), seed=77).numpy().reshape(-1).astype(np.uint16)
    for split in ("train", "validation"):
        write_shard(run.path(split, "00000.arrow"), [tokens], ["d0"], np.uint16)
    shards = run.commit({"tokenizer_digest": tokenizer, "vocab_size": 61}, seconds=0.0)
    assert isinstance(shards, TokenShards)
    return shards


def make_checkpoint(folder: Path, state: Mapping[str, Tensor] | None = None, *, name: str = "a") -> Checkpoint:
    run = stage_run(folder, "Checkpoint", name=name)
    write_checkpoint(Path(run.path("model")), "dense", state)
    checkpoint = run.commit({"tokenizer_digest": "t0"}, seconds=0.0)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def make_run(folder: Path, *inputs: Artifact) -> StageRun:
    return dataclasses.replace(stage_run(folder, "QuantizedModel", *inputs), step="quantize")


def make_job(folder: Path, checkpoint: Checkpoint, shards: TokenShards, settings: QuantizeSettings) -> QuantizeJob:
    return QuantizeJob(
        checkpoint=checkpoint,
        shards=shards,
        settings=settings,
        device="cpu",
        step="quantize",
        target=str(folder / "int8"),
    )


def test_the_task_measures_both_models_on_the_same_tokens(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    reports = list(quantize_and_measure(make_job(tmp_path, checkpoint, shards, SETTINGS)))
    assert [report.done for report in reports] == list(range(1, reports[-1].total + 1))
    facts = reports[-1].facts
    tokens = make_tokens(1, 100 * SEQ_LEN, seed=77)[0]
    starts = [(i * 100 // 64) * SEQ_LEN for i in range(64)]  # 64 rows of 32 tokens, spread evenly over 100
    rows = [tokens[start : start + SEQ_LEN + 1] for start in starts]
    losses = []
    for model in (
        load_checkpoint_folder(Path(checkpoint.path("model")), dtype=torch.float32, device="cpu"),
        load_quantized(tmp_path / "int8"),
    ):
        with torch.inference_mode():
            nats = [float(model(row[None, :-1], targets=row[None, 1:])) for row in rows]
        losses.append(sum(nats) / sum(len(row) - 1 for row in rows))
    assert facts["tokens"] == sum(len(row) - 1 for row in rows)
    assert facts["perplexity"] == pytest.approx(math.exp(losses[1]), rel=1e-3)
    assert facts["perplexity_ratio"] == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-3)
    assert 0.99 < facts["perplexity_ratio"] < 1.01
    assert facts["tokenizer_digest"] == "t0"


@pytest.mark.shows("Quantization fails, and leaves nothing behind, when perplexity grows by more than 1 %")
def test_a_model_that_int8_spoils_fails_the_gate_and_leaves_no_files(tmp_path: Path) -> None:
    state = plant_outliers(trained_state("dense"))
    checkpoint, shards = make_checkpoint(tmp_path, state), make_shards(tmp_path)
    message = (
        r"^quantize.max_perplexity_ratio \(\d+\.?\d*\) must be at most 1.01: the INT8 model's perplexity over the "
        r"checkpoint's \(loss \d\.\d+ and \d\.\d+ nats a token\); train the checkpoint further or otherwise, or raise"
    )
    with pytest.raises(ArtifactError, match=message):
        list(quantize_and_measure(make_job(tmp_path, checkpoint, shards, SETTINGS)))
    assert not (tmp_path / "int8").exists()


def test_outliers_spoil_only_the_int8_model(tmp_path: Path) -> None:
    tokens = make_tokens(16, SEQ_LEN, seed=5)
    healthy, planted = trained_state("dense"), plant_outliers(trained_state("dense"))
    models = [
        load_checkpoint_folder(write_checkpoint(tmp_path / name, "dense", state), dtype=torch.float32, device="cpu")
        for name, state in (("healthy", healthy), ("planted", planted))
    ]
    with torch.inference_mode():
        torch.testing.assert_close(models[1](tokens), models[0](tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("int8_loss", "shown"), [(1.013, "1.013"), (math.nan, "nan"), (1e6, "1.014e\\+304")])
def test_the_gate_says_how_much_worse_it_is(int8_loss: float, shown: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^int8.max_perplexity_ratio \({shown}\) must be at most 1.01"):
        check_gate(1.0, 1.0 + math.log(int8_loss) if int8_loss < 2 else int8_loss, QuantizeSettings(), "int8")


def test_the_gate_is_the_settings(tmp_path: Path) -> None:
    assert check_gate(1.0, 1.05, QuantizeSettings(max_perplexity_ratio=1.06), "int8") == pytest.approx(math.exp(0.05))
    assert check_gate(1.0, 0.99, QuantizeSettings(), "int8") < 1


def test_shards_without_a_token_to_predict_are_refused(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path, num_rows=0)
    with pytest.raises(InputError, match=r"validation \(no text\) must hold some text; raise validation_fraction"):
        list(quantize_and_measure(make_job(tmp_path, checkpoint, shards, SETTINGS)))


@pytest.mark.ray
def test_the_stage_commits_a_model_that_loads(local_ray: str, tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    artifact = quantize(SETTINGS, make_run(tmp_path, checkpoint, shards))
    assert isinstance(artifact, QuantizedModel)
    artifact.verify_files()
    names = {info.path for info in artifact.manifest.files}
    assert names == {
        f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    }
    sizes = quantize_folder(Path(checkpoint.path("model")), tmp_path / "again", max_shard_bytes=1 << 30)
    assert artifact.fact("bytes") == sizes.int8
    assert artifact.fact("size_ratio") == sizes.int8 / sizes.bf16
    assert set(artifact.manifest.facts) == {
        "perplexity",
        "perplexity_ratio",
        "size_ratio",
        "bytes",
        "tokens",
        "tokenizer_digest",
    }
    for name in names:
        assert Path(artifact.path(name)).read_bytes() == (tmp_path / "again" / Path(name).name).read_bytes()
    assert load_quantized(artifact.path("model"))(make_tokens(1, 8, seed=0)).shape == (1, 8, 61)


@pytest.mark.ray
def test_a_model_that_int8_spoils_is_not_committed(local_ray: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, plant_outliers(trained_state("dense")))
    run = make_run(tmp_path, checkpoint, make_shards(tmp_path))
    with pytest.raises(ArtifactError, match=r"quantize.max_perplexity_ratio \(.*\) must be at most 1.01"):
        quantize(SETTINGS, run)
    assert find_artifact(run.uri) is None
    assert not list(Path(run.uri).rglob("*"))


@pytest.mark.ray
def test_a_damaged_checkpoint_is_refused(local_ray: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    weights = Path(checkpoint.path("model", "model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 \w+\) must have sha256 \w+, as its manifest"):
        quantize(SETTINGS, make_run(tmp_path, checkpoint, make_shards(tmp_path)))


@pytest.mark.ray
def test_shards_of_another_tokenizer_are_refused(local_ray: str, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, tokenizer="t1")
    with pytest.raises(ArtifactError, match=r"\(tokenizer t1\) must be made with the model's tokenizer, t0"):
        quantize(SETTINGS, make_run(tmp_path, make_checkpoint(tmp_path), shards))


@pytest.mark.ray
def test_more_threads_than_a_node_has_are_refused(local_ray: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, make_checkpoint(tmp_path), make_shards(tmp_path))
    with pytest.raises(ClusterError, match=r"quantize: tasks \(1\) must be at most 0, .* hold at 64 CPU a worker"):
        quantize(dataclasses.replace(SETTINGS, threads=64), run)
    with pytest.raises(ClusterError, match=r"quantize: tasks \(1\) must be at most 0, .* hold at 1 CPU and 1 GPU"):
        quantize(dataclasses.replace(SETTINGS, device="cuda"), run)
