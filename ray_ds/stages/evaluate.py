"""The evaluate stage: Checkpoint or QuantizedModel, and TokenShards -> EvalReport, on Ray actors and tasks."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from pydantic import JsonValue
from ray.util import ActorPool

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel, StageRun, TokenShards
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError, ConfigError, InputError
from ray_ds.evaluate.compression import conditional_bits_per_byte, xz_bytes
from ray_ds.evaluate.models import load_model
from ray_ds.evaluate.ngrams import BLOCK_TOKENS, bigram_nats, fit_bigram
from ray_ds.evaluate.perplexity import Score, bits_per_byte, micro_batches, sum_loss
from ray_ds.evaluate.spans import Span, count_bytes, plan_spans, text_of
from ray_ds.logs import Progress
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.user_errors import user_errors
from ray_ds.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What actors and tasks need to know."""

    model: Artifact
    shards: TokenShards
    settings: EvaluateSettings
    device: str
    spans: Sequence[Span]
    """The tokens of the validation split that are predicted."""


def evaluate(settings: EvaluateSettings, run: StageRun) -> Artifact:
    """Score a model on the validation split, beside unigram, bigram and xz on the same text."""
    started = time.monotonic()
    model: Artifact = run.input(Checkpoint, QuantizedModel)
    shards = run.input(TokenShards)
    check_same_tokenizer(model, shards)
    check_seq_len(model, settings, run.step)
    for artifact in (model, shards):
        artifact.verify_files()
    device = choose_device(settings.device, settings.num_workers)
    check_cluster(
        run.run_dir,
        num_workers=settings.num_workers,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=float(device == "cuda"),
        field=f"{run.step}.num_workers",
    )
    spans, num_bytes = plan_validation(settings, shards)
    job = EvaluateJob(model=model, shards=shards, settings=settings, device=device, spans=spans)
    with user_errors():
        scorers = start_scorers(job)
        baselines = Baselines(job) if settings.baseline_tokens else None
        score = score_model(scorers, job, num_bytes, Progress(run.step, sum(span.num_targets for span in spans)))
        facts: dict[str, JsonValue] = {
            "model_kind": model.kind,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
            "bytes": score.bytes,
            **(baselines.facts(num_bytes) if baselines else {}),
        }
    report = {**facts, "model": model.uri, "shards": shards.uri, "settings": dataclasses.asdict(settings)}
    storage.write_bytes(run.path("report.json"), json.dumps(report, indent=1).encode() + b"\n")
    return run.commit(facts, seconds=time.monotonic() - started)


def check_same_tokenizer(model: Artifact, shards: TokenShards) -> None:
    """Refuse shards whose ids mean other tokens than the model's."""
    expected, found = model.fact("tokenizer_digest"), shards.fact("tokenizer_digest")
    if expected != found:
        raise ArtifactError(
            shards.uri,
            f"tokenizer {found}",
            f"must be made with the model's tokenizer, {expected}",
            "name in `from` the shards that the model was trained on",
        )


def check_seq_len(model: Artifact, settings: EvaluateSettings, step: str) -> None:
    """Refuse sequences longer than the model was made for."""
    config = json.loads(storage.read_bytes(model.path(MODEL_FOLDER, "config.json")))
    longest = config["max_position_embeddings"]
    if settings.seq_len > longest:
        allowed = f"must be at most {longest}, the length the model was made for"
        raise ConfigError(f"{step}.seq_len", settings.seq_len, allowed, f"try {longest}")


def choose_device(wanted: Literal["auto", "cpu", "cuda"], num_workers: int) -> str:
    """Return `cpu` or `cuda`; auto = cuda where the cluster has a GPU for each worker."""
    if wanted == "auto":
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= num_workers else "cpu"
    return wanted


def plan_validation(settings: EvaluateSettings, shards: TokenShards) -> tuple[list[Span], int]:
    """Return what is predicted, and the bytes of text it stands for."""
    with tempfile.TemporaryDirectory() as cache:
        validation = TokenSplit.open(shards.uri, "validation", Path(cache))
        spans = plan_spans(validation, settings.seq_len, settings.max_tokens)
        num_bytes = count_bytes(validation, spans, load_tokenizer(shards.path("tokenizer.json")))
    if not num_bytes:
        raise InputError(shards.path("validation"), "no text", "must hold some text", "raise validation_fraction")
    return spans, num_bytes


class Scorer:
    """An actor that has loaded the model."""

    def __init__(self, job: EvaluateJob) -> None:
        torch.set_num_threads(job.settings.threads_per_worker)
        self._cache = tempfile.TemporaryDirectory()
        self._device = job.device
        self._model = load_model(job.model, job.settings.precision, job.device, Path(self._cache.name))
        self._split = TokenSplit.open(job.shards.uri, "validation", Path(self._cache.name))

    def sum_loss(self, spans: Sequence[Span]) -> tuple[int, float]:
        """Return the targets of a micro-batch and what they cost, in nats."""
        return sum(span.num_targets for span in spans), sum_loss(self._model, self._split, spans, self._device)


def start_scorers(job: EvaluateJob) -> list[Any]:
    """Start the actors, as many as there are workers."""
    options = {"num_cpus": job.settings.cpus_per_worker, "num_gpus": float(job.device == "cuda")}
    actor = ray.remote(max_restarts=2, max_task_retries=2, **options)(Scorer)
    return [actor.remote(job) for _ in range(job.settings.num_workers)]


def score_model(scorers: list[Any], job: EvaluateJob, num_bytes: int, progress: Progress) -> Score:
    """Deal micro-batches to the actors; the sum is the same whichever actor takes which (`math.fsum` is exact)."""
    batches = micro_batches(job.spans, job.settings.micro_batch)
    tokens, nats = 0, list[float]()
    for num_targets, cost in ActorPool(scorers).map_unordered(
        lambda actor, batch: actor.sum_loss.remote(batch), batches
    ):
        tokens += num_targets
        nats.append(cost)
        progress.update(tokens, loss=math.fsum(nats) / tokens)
    for scorer in scorers:
        ray.kill(scorer)
    return Score(nats=math.fsum(nats), tokens=tokens, bytes=num_bytes)


class Baselines:
    """Unigram and bigram, and the two runs of xz: three Ray tasks beside the model's actors."""

    def __init__(self, job: EvaluateJob) -> None:
        shared = ray.put(job)
        self._ngrams = ray.remote(num_cpus=1)(score_ngrams).remote(shared)
        compress = ray.remote(num_cpus=1)(compress_text)
        self._train = compress.remote(shared, with_validation=False)
        self._both = compress.remote(shared, with_validation=True)

    def facts(self, num_bytes: int) -> dict[str, JsonValue]:
        """Wait for the tasks and return their bits per byte."""
        unigram, bigram = ray.get(self._ngrams)
        train, both = ray.get([self._train, self._both])
        return {
            "unigram_bits_per_byte": bits_per_byte(unigram, num_bytes),
            "bigram_bits_per_byte": bits_per_byte(bigram, num_bytes),
            "xz_bits_per_byte": conditional_bits_per_byte(train, both, num_bytes),
        }


def score_ngrams(job: EvaluateJob) -> tuple[float, float]:
    """Return what the validation tokens cost unigram and bigram, in nats."""
    with tempfile.TemporaryDirectory() as cache:
        train = TokenSplit.open(job.shards.uri, "train", Path(cache))
        model = fit_bigram(train, job.shards.fact("vocab_size"), job.settings.baseline_tokens)
        return bigram_nats(model, TokenSplit.open(job.shards.uri, "validation", Path(cache)), job.spans)


def compress_text(job: EvaluateJob, *, with_validation: bool) -> int:
    """Return the xz length of the training text, alone or with the validation text after it.

    The text is that of the tokens, from which nothing is lost. Where documents begin costs xz nothing, but the model.
    """
    tokenizer = load_tokenizer(job.shards.path("tokenizer.json"))
    with tempfile.TemporaryDirectory() as cache:
        train = TokenSplit.open(job.shards.uri, "train", Path(cache))
        validation = TokenSplit.open(job.shards.uri, "validation", Path(cache))
        train_text = text_of(train, plan_spans(train, BLOCK_TOKENS, job.settings.baseline_tokens), tokenizer)
        text = text_of(validation, job.spans, tokenizer)
    window = len(train_text) + len(text)
    return xz_bytes(train_text + text if with_validation else train_text, window)
