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
from ray_ds.config.quantize import QuantizeSettings, Scheme
from ray_ds.data.shard_file import write_shard
from ray_ds.errors import ArtifactError, ClusterError, InputError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import load_quantized
from ray_ds.quantize.calibration import Maxima, merge_maxima
from ray_ds.quantize.comparison import Comparison
from ray_ds.stage_run import StageRun
from ray_ds.stages.quantize import QuantizeJob, check_gates, measure_part, quantize, quantize_and_compare
from tests.quantize.tiny_models import SEQ_LEN, make_tokens, plant_outliers, trained_state, write_checkpoint
from tests.stages.small_artifacts import stage_run

SETTINGS = QuantizeSettings(smoothing=0.5, gate_tokens=2048, device="cpu")


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


def maxima_of(job: QuantizeJob, tasks: int = 1) -> Maxima:
    """Calibrate as the stage does, without Ray."""
    return merge_maxima(measure_part(job, part, tasks) for part in range(tasks))


def test_the_task_compares_both_models_on_the_same_tokens(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    job = make_job(tmp_path, checkpoint, shards, SETTINGS)
    reports = list(quantize_and_compare(job, maxima_of(job)))
    assert [report.done for report in reports] == list(range(1, reports[-1].total + 1))
    facts = reports[-1].facts
    tokens = make_tokens(1, 100 * SEQ_LEN, seed=77)[0]
    starts = [(i * 100 // 64) * SEQ_LEN for i in range(64)]  # 64 rows of 32 tokens, spread evenly over 100
    rows = [tokens[start : start + SEQ_LEN + 1] for start in starts]
    models = (
        load_checkpoint_folder(Path(checkpoint.path("model")), dtype=torch.float32, device="cpu"),
        load_quantized(tmp_path / "int8"),
    )
    losses, logs = [], []
    for model in models:
        with torch.inference_mode():
            nats = [float(model(row[None, :-1], targets=row[None, 1:])) for row in rows]
            logs.append(torch.cat([model(row[None, :-1])[0] for row in rows]).double().log_softmax(dim=-1))
        losses.append(sum(nats) / sum(len(row) - 1 for row in rows))
    assert facts["tokens"] == sum(len(row) - 1 for row in rows)
    assert facts["perplexity"] == pytest.approx(math.exp(losses[1]), rel=1e-3)
    assert facts["perplexity_ratio"] == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-3)
    assert 0.99 < facts["perplexity_ratio"] < 1.005
    divergence = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert facts["kl"] == pytest.approx(float(divergence), rel=1e-2)
    assert facts["top1_agreement"] == float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean())
    assert facts["tokenizer_digest"] == "t0"
    assert (facts["scheme"], facts["smoothing"]) == ("w8a8", 0.5)


@pytest.mark.shows(
    "Ten outlier channels of 50 x fail plain W8A8 at its gates, with nothing left behind; smoothing passes"
)
def test_outliers_fail_the_gates_and_smoothing_passes(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path, plant_outliers(trained_state("dense"))), make_shards(tmp_path)
    plain = make_job(tmp_path, checkpoint, shards, dataclasses.replace(SETTINGS, smoothing=0.0))
    message = (
        r"^quantize.max_perplexity_ratio \(1\.\d+\) must be at most 1.005: the quantized model's perplexity over the "
        r"checkpoint's \(loss \d\.\d+ and \d\.\d+ nats a token\); set smoothing = 0.5, use scheme w8a16, or change"
    )
    with pytest.raises(ArtifactError, match=message):
        list(quantize_and_compare(plain, {}))
    assert not (tmp_path / "int8").exists()
    smoothed = make_job(tmp_path, checkpoint, shards, SETTINGS)
    facts = list(quantize_and_compare(smoothed, maxima_of(smoothed)))[-1].facts
    assert facts["perplexity_ratio"] < 1.002
    assert facts["kl"] < 0.001


def test_any_number_of_tasks_calibrates_to_the_same_bytes(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    written = []
    for tasks in (1, 3):
        job = make_job(tmp_path / str(tasks), checkpoint, shards, dataclasses.replace(SETTINGS, micro_batch=8 // tasks))
        list(quantize_and_compare(job, maxima_of(job, tasks)))
        written.append({path.name: path.read_bytes() for path in (tmp_path / str(tasks) / "int8").iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("scheme", ["w8a16", "fp8"])
def test_other_schemes_pass_too(tmp_path: Path, scheme: Scheme) -> None:
    settings = dataclasses.replace(SETTINGS, scheme=scheme, smoothing=0.0)
    job = make_job(tmp_path, make_checkpoint(tmp_path), make_shards(tmp_path), settings)
    facts = list(quantize_and_compare(job, {}))[-1].facts
    assert (facts["scheme"], facts["smoothing"]) == (scheme, 0.0)
    assert facts["kl"] < 0.001
    assert load_quantized(tmp_path / "int8")(make_tokens(1, 8, seed=0)).shape == (1, 8, 61)


def test_outliers_spoil_only_the_int8_model(tmp_path: Path) -> None:
    tokens = make_tokens(16, SEQ_LEN, seed=5)
    healthy, planted = trained_state("dense"), plant_outliers(trained_state("dense"))
    models = [
        load_checkpoint_folder(write_checkpoint(tmp_path / name, "dense", state), dtype=torch.float32, device="cpu")
        for name, state in (("healthy", healthy), ("planted", planted))
    ]
    with torch.inference_mode():
        torch.testing.assert_close(models[1](tokens), models[0](tokens), rtol=1e-3, atol=1e-3)


GOOD = Comparison(tokens=1000, float_nats=1000.0, quantized_nats=1001.0, kl_nats=2.0, same_top1=995)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantized_nats": 1006.0}, r"max_perplexity_ratio \(1.006\) must be at most 1.005: the quantized model's"),
        ({"quantized_nats": math.nan}, r"max_perplexity_ratio \(nan\) must be at most 1.005"),
        ({"quantized_nats": 1e9}, r"max_perplexity_ratio \(1.014e\+304\) must be at most 1.005"),
        (
            {"kl_nats": 10.5},
            r"max_kl \(0.0105\) must be at most 0.01: nats a token by which the quantized model diverges",
        ),
        (
            {"same_top1": 979},
            r"min_top1_agreement \(0.979\) must be at least 0.98: the share of tokens that both models",
        ),
    ],
)
def test_each_gate_says_what_it_measures(change: dict[str, float], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^int8.{message}"):
        check_gates(dataclasses.replace(GOOD, **change), QuantizeSettings(), "int8")


def test_the_gates_are_the_settings() -> None:
    check_gates(GOOD, QuantizeSettings(), "int8")
    bad = dataclasses.replace(GOOD, quantized_nats=1050.0, kl_nats=50.0, same_top1=800)
    check_gates(bad, QuantizeSettings(max_perplexity_ratio=1.06, max_kl=0.06, min_top1_agreement=0.7), "int8")


def test_shards_without_a_token_to_predict_are_refused(tmp_path: Path) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path, num_rows=0)
    with pytest.raises(InputError, match=r"validation \(no text\) must hold some text; raise validation_fraction"):
        list(quantize_and_compare(make_job(tmp_path, checkpoint, shards, SETTINGS), {}))


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
    job = make_job(tmp_path / "again", checkpoint, shards, SETTINGS)
    facts = list(quantize_and_compare(job, maxima_of(job)))[-1].facts
    assert artifact.manifest.facts == facts
    assert len(facts["weight_errors"]) == 10
    for name in names:
        again = tmp_path / "again" / "int8" / Path(name).name
        assert Path(artifact.path(name)).read_bytes() == again.read_bytes()
    assert load_quantized(artifact.path("model"))(make_tokens(1, 8, seed=0)).shape == (1, 8, 61)


@pytest.mark.ray
def test_a_model_that_int8_spoils_is_not_committed(local_ray: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, plant_outliers(trained_state("dense")))
    run = make_run(tmp_path, checkpoint, make_shards(tmp_path))
    with pytest.raises(ArtifactError, match=r"quantize.max_perplexity_ratio \(.*\) must be at most 1.005"):
        quantize(dataclasses.replace(SETTINGS, smoothing=0.0), run)
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
    with pytest.raises(ClusterError, match=r"quantize.num_workers \(1\) must be at most 0, .* hold at 64 CPU a worker"):
        quantize(dataclasses.replace(SETTINGS, threads=64), run)
    with pytest.raises(ClusterError, match=r"quantize.num_workers \(1\) must be at most 0, .* hold at 1 CPU and 1 GPU"):
        quantize(dataclasses.replace(SETTINGS, device="cuda"), run)
