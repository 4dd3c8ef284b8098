"""The quantize stage: Checkpoint + TokenShards -> QuantizedModel, in one Ray task."""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, TokenShards
from ray_ds.config.quantize import QuantizeSettings
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError, InputError
from ray_ds.evaluate.perplexity import micro_batches, sum_loss
from ray_ds.evaluate.spans import plan_spans
from ray_ds.logs import Progress
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, read_config
from ray_ds.model.local_folder import MODEL_FOLDER, local_model_folder
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.user_errors import user_errors
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.stage_run import StageRun
from ray_ds.stages.evaluate import check_same_tokenizer, choose_device

LARGEST_LOSS_GROWTH = 700.0
"""Nats a token; the exponential of more leaves the range of a float."""


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """What the task needs to know."""

    checkpoint: Checkpoint
    shards: TokenShards
    settings: QuantizeSettings
    device: str
    step: str
    target: str
    """URI of the folder that gets the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How far the task has come; the last report brings the facts."""

    done: int
    total: int
    facts: dict[str, JsonValue]


def quantize(settings: QuantizeSettings, run: StageRun) -> Artifact:
    """Write a checkpoint as an INT8 model, once it is shown to predict the validation text as well."""
    started = time.monotonic()
    checkpoint, shards = run.input(Checkpoint), run.input(TokenShards)
    check_same_tokenizer(checkpoint, shards)
    for artifact in (checkpoint, shards):
        artifact.verify_files()
    device = choose_device(settings.device, num_workers=1)
    num_gpus = float(device == "cuda")
    check_cluster(
        run.run_dir,
        num_workers=1,
        cpus_per_worker=settings.threads,
        gpus_per_worker=num_gpus,
        field=f"{run.step}: tasks",
    )
    job = QuantizeJob(
        checkpoint=checkpoint,
        shards=shards,
        settings=settings,
        device=device,
        step=run.step,
        target=run.path(MODEL_FOLDER),
    )
    task = ray.remote(num_cpus=settings.threads, num_gpus=num_gpus)(quantize_and_measure)
    progress: Progress | None = None
    with user_errors():
        for reference in task.remote(job):
            report: Report = ray.get(reference)
            progress = progress or Progress(run.step, report.total)
            progress.update(report.done)
    return run.commit(report.facts, seconds=time.monotonic() - started)


def quantize_and_measure(job: QuantizeJob) -> Iterator[Report]:
    """Write the INT8 model to a local folder, measure both models, and copy the new one to its place if it may pass.

    Raises:
        ArtifactError: the checkpoint or the shards are damaged, or the perplexity grows by too much.
        InputError: the validation split has no token to predict.
    """
    torch.set_num_threads(job.settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = local_model_folder(job.checkpoint, Path(scratch)), Path(scratch) / "int8"
        sizes = quantize_folder(source, target, max_shard_bytes=job.settings.max_shard_bytes)
        split = TokenSplit.open(job.shards.uri, "validation", Path(scratch))
        spans = plan_spans(split, read_config(source).max_position_embeddings, job.settings.gate_tokens)
        if not spans:
            raise InputError(
                job.shards.path("validation"), "no text", "must hold some text", "raise validation_fraction"
            )
        batches = micro_batches(spans, job.settings.micro_batch)
        nats = list[float]()
        for is_int8 in (False, True):
            load = load_quantized if is_int8 else load_checkpoint_folder
            model = load(target if is_int8 else source, dtype=torch.float32, device=job.device)
            for batch in batches:
                nats.append(sum_loss(model, split, batch, job.device))
                yield Report(done=len(nats), total=2 * len(batches) + 1, facts={})
        num_tokens = sum(span.num_targets for span in spans)
        losses = [math.fsum(part) / num_tokens for part in (nats[: len(batches)], nats[len(batches) :])]
        ratio = check_gate(losses[0], losses[1], job.settings, job.step)
        for path in sorted(target.iterdir()):
            storage.write_bytes(storage.join(job.target, path.name), path.read_bytes())
    facts: dict[str, JsonValue] = {
        "perplexity": math.exp(losses[1]),
        "perplexity_ratio": ratio,
        "size_ratio": sizes.int8 / sizes.bf16,
        "bytes": sizes.int8,
        "tokens": num_tokens,
        "tokenizer_digest": job.checkpoint.fact("tokenizer_digest"),
    }
    yield Report(done=2 * len(batches) + 1, total=2 * len(batches) + 1, facts=facts)


def check_gate(float_loss: float, int8_loss: float, settings: QuantizeSettings, step: str) -> float:
    """Return how many times the checkpoint's perplexity the INT8 model's is.

    Args:
        float_loss: the checkpoint's nats a token.
        int8_loss: the INT8 model's.
    Raises:
        ArtifactError: it is more than the settings allow, or no number.
    """
    ratio = math.exp(min(int8_loss - float_loss, LARGEST_LOSS_GROWTH))
    if not ratio <= settings.max_perplexity_ratio:
        raise ArtifactError(
            f"{step}.max_perplexity_ratio",
            f"{ratio:.4g}",
            f"must be at most {settings.max_perplexity_ratio:g}: the INT8 model's perplexity over the checkpoint's "
            f"(loss {int8_loss:.4f} and {float_loss:.4f} nats a token)",
            "train the checkpoint further or otherwise, or raise the setting to accept this model",
        )
    return ratio
