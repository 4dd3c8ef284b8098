"""The quantize stage: Checkpoint + TokenShards -> QuantizedModel, in Ray tasks.

Tasks measure the activations on text of the train split, if they are smoothed; one more writes the model, compares it
with its checkpoint on the validation split, and puts it into its place if it passes the gates.
"""

import heapq
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, TokenShards
from ray_ds.config.quantize import QuantizeSettings
from ray_ds.data.shards import Split, TokenSplit
from ray_ds.errors import ArtifactError, InputError
from ray_ds.evaluate.perplexity import micro_batches
from ray_ds.evaluate.spans import Span, plan_spans
from ray_ds.logs import Progress, log_event
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, read_config, read_tensors
from ray_ds.model.local_folder import MODEL_FOLDER, local_model_folder
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.user_errors import user_errors
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.quantize.calibration import Maxima, measure_maxima, merge_maxima
from ray_ds.quantize.comparison import Comparison, compare, merge_comparisons
from ray_ds.quantize.convert import Written
from ray_ds.quantize.smoothing import TensorFactors, find_factors
from ray_ds.stage_run import StageRun
from ray_ds.stages.evaluate import check_same_tokenizer, choose_device

NAMED_WEIGHTS = 10
"""Weights whose errors are kept: those that lost most."""


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """What tasks need to know."""

    checkpoint: Checkpoint
    shards: TokenShards
    settings: QuantizeSettings
    device: str
    step: str
    target: str
    """URI of the folder that gets the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How far a task has come; the last report brings the facts."""

    done: int
    total: int
    facts: dict[str, JsonValue]


def quantize(settings: QuantizeSettings, run: StageRun) -> Artifact:
    """Write a checkpoint as a quantized model, once it is shown to predict the validation text as well."""
    started = time.monotonic()
    checkpoint, shards = run.input(Checkpoint), run.input(TokenShards)
    check_same_tokenizer(checkpoint, shards)
    for artifact in (checkpoint, shards):
        artifact.verify_files()
    device = choose_device(settings.device, num_workers=settings.num_workers)
    resources: dict[str, Any] = {"num_cpus": settings.threads, "num_gpus": float(device == "cuda")}
    check_cluster(
        run.run_dir,
        num_workers=settings.num_workers,
        cpus_per_worker=settings.threads,
        gpus_per_worker=resources["num_gpus"],
        field=f"{run.step}.num_workers",
    )
    job = QuantizeJob(
        checkpoint=checkpoint,
        shards=shards,
        settings=settings,
        device=device,
        step=run.step,
        target=run.path(MODEL_FOLDER),
    )
    with user_errors():
        maxima = calibrate(job, resources) if settings.smoothing else {}
        task = ray.remote(**resources)(quantize_and_compare)
        progress: Progress | None = None
        for reference in task.remote(job, maxima):
            report: Report = ray.get(reference)
            progress = progress or Progress(run.step, report.total)
            progress.update(report.done)
    return run.commit(report.facts, seconds=time.monotonic() - started)


def calibrate(job: QuantizeJob, resources: Mapping[str, Any]) -> Maxima:
    """Return the activations' largest magnitudes; a maximum is the same whichever task measures which text."""
    count = job.settings.num_workers
    task = ray.remote(**resources)(measure_part)
    parts: list[Maxima] = ray.get([task.remote(job, part, count) for part in range(count)])
    log_event("calibrated", step=job.step, tokens=job.settings.calibration_tokens, tasks=count)
    return merge_maxima(parts)


def measure_part(job: QuantizeJob, part: int, count: int) -> Maxima:
    """Return the largest magnitudes in part number `part` of `count` of the calibration's micro-batches."""
    torch.set_num_threads(job.settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = local_model_folder(job.checkpoint, Path(scratch))
        split, batches = plan_batches(job, "train", job.settings.calibration_tokens, source, Path(scratch))
        decoder = load_checkpoint_folder(source, dtype=torch.float32, device=job.device)
        return merge_maxima(measure_maxima(decoder, split, batch) for batch in batches[part::count])


def quantize_and_compare(job: QuantizeJob, maxima: Mapping[str, Tensor]) -> Iterator[Report]:
    """Write the model to a local folder, compare it with its checkpoint, and copy it to its place if it may pass.

    Args:
        maxima: from `calibrate`; empty = no smoothing.
    Raises:
        ArtifactError: the checkpoint or the shards are damaged, or the model fails a gate.
        InputError: the validation split has no token to predict.
    """
    settings = job.settings
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = local_model_folder(job.checkpoint, Path(scratch)), Path(scratch) / "quantized"
        split, batches = plan_batches(job, "validation", settings.gate_tokens, source, Path(scratch))
        factors: dict[str, TensorFactors] = {}
        if maxima:
            factors = find_factors(read_config(source), read_tensors(source), maxima, settings.smoothing)
        written = quantize_folder(
            source, target, max_shard_bytes=settings.max_shard_bytes, scheme=settings.scheme, factors=factors
        )
        reference = load_checkpoint_folder(source, dtype=torch.float32, device=job.device)
        quantized = load_quantized(target, dtype=torch.float32, device=job.device)
        parts: list[Comparison] = []
        for batch in batches:
            parts.append(compare(reference, quantized, split, batch))
            yield Report(done=len(parts), total=len(batches) + 1, facts={})
        comparison = merge_comparisons(parts)
        check_gates(comparison, settings, job.step)
        for path in sorted(target.iterdir()):
            storage.write_bytes(storage.join(job.target, path.name), path.read_bytes())
    facts = {**find_facts(comparison, written, settings), "tokenizer_digest": job.checkpoint.fact("tokenizer_digest")}
    yield Report(done=len(batches) + 1, total=len(batches) + 1, facts=facts)


def plan_batches(
    job: QuantizeJob, name: Split, max_tokens: int, model: Path, cache: Path
) -> tuple[TokenSplit, list[Sequence[Span]]]:
    """Return a split and micro-batches of rows that are spread evenly over it.

    Raises:
        InputError: it has no token to predict.
    """
    split = TokenSplit.open(job.shards.uri, name, cache)
    longest = min(job.settings.seq_len, read_config(model).max_position_embeddings)
    spans = plan_spans(split, longest, max_tokens)
    if not spans:
        raise InputError(job.shards.path(name), "no text", "must hold some text", "raise validation_fraction")
    return split, micro_batches(spans, job.settings.micro_batch)


def check_gates(comparison: Comparison, settings: QuantizeSettings, step: str) -> None:
    """Refuse a model that is too far from its checkpoint.

    Raises:
        ArtifactError: a measure is beyond its setting, or no number; the message says what to try.
    """
    losses = [nats / comparison.tokens for nats in (comparison.quantized_nats, comparison.float_nats)]
    smooth = "raise smoothing" if settings.smoothing else "set smoothing = 0.5"
    remedy = f"{smooth}, use scheme w8a16" if settings.scheme == "w8a8" else "train the checkpoint further"
    gates = (
        (
            "max_perplexity_ratio",
            comparison.perplexity_ratio,
            comparison.perplexity_ratio <= settings.max_perplexity_ratio,
            f"must be at most {settings.max_perplexity_ratio:g}: the quantized model's perplexity over the "
            f"checkpoint's (loss {losses[0]:.4f} and {losses[1]:.4f} nats a token)",
        ),
        (
            "max_kl",
            comparison.kl,
            comparison.kl <= settings.max_kl,
            f"must be at most {settings.max_kl:g}: nats a token by which the quantized model diverges",
        ),
        (
            "min_top1_agreement",
            comparison.top1_agreement,
            comparison.top1_agreement >= settings.min_top1_agreement,
            f"must be at least {settings.min_top1_agreement:g}: the share of tokens that both models find likeliest",
        ),
    )
    for name, found, passes, allowed in gates:
        if not passes:
            action = f"{remedy}, or change the setting to accept this model"
            raise ArtifactError(f"{step}.{name}", f"{found:.4g}", allowed, action)


def find_facts(comparison: Comparison, written: Written, settings: QuantizeSettings) -> dict[str, JsonValue]:
    """Return what is kept of a model that passed."""
    worst = heapq.nlargest(NAMED_WEIGHTS, written.weight_errors.items(), key=lambda item: item[1])
    return {
        "scheme": settings.scheme,
        "smoothing": settings.smoothing,
        "perplexity": comparison.perplexity,
        "perplexity_ratio": comparison.perplexity_ratio,
        "kl": comparison.kl,
        "top1_agreement": comparison.top1_agreement,
        "tokens": comparison.tokens,
        "bytes": written.bytes,
        "size_ratio": written.bytes / written.bf16_bytes,
        "weight_errors": dict(worst),
    }
