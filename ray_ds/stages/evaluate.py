"""The evaluate stage: Checkpoint or QuantizedModel, and TokenShards -> EvalReport, on Ray actors and tasks.

Actors with the model in memory predict the validation split and answer the tasks' questions, ours and those of
lm-evaluation-harness. Beside them run the baselines.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from pydantic import JsonValue
from ray.util import ActorPool

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel, TokenShards
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError, ConfigError, InputError
from ray_ds.evaluate.asking import AskedTask, ask_task
from ray_ds.evaluate.bleu import check_sacrebleu
from ray_ds.evaluate.compression import conditional_bits_per_byte, xz_bytes
from ray_ds.evaluate.lm_eval_model import LmEvalAnswers
from ray_ds.evaluate.lm_eval_tasks import OFFLINE, check_tasks, run_harness
from ray_ds.evaluate.models import open_chat
from ray_ds.evaluate.ngrams import BLOCK_TOKENS, bigram_nats, fit_bigram
from ray_ds.evaluate.outcomes import OUTCOMES_FILE, Outcome, write_outcomes
from ray_ds.evaluate.perplexity import Score, bits_per_byte, micro_batches
from ray_ds.evaluate.questions import read_questions
from ray_ds.evaluate.rating_scores import summarise_ratings
from ray_ds.evaluate.ratings import read_ratings
from ray_ds.evaluate.spans import Span, count_bytes, plan_spans, text_of
from ray_ds.evaluate.tables import report_rows
from ray_ds.evaluate.task_files import fingerprint_tasks
from ray_ds.evaluate.tasks import judge, plan_work, score_task
from ray_ds.logs import Progress, log_table
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.scorers import EvaluateJob, answer_batches, running_scorers
from ray_ds.on_ray.user_errors import user_errors
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import load_tokenizer

T = TypeVar("T")


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
    check_lm_eval_chats(settings, model, run.step)
    questions = ask_tasks(settings, model, run.step)
    ratings = score_ratings(settings, model, run.step)
    job = EvaluateJob(model=model, shards=shards, settings=settings, device=device, spans=spans)
    if settings.lm_eval is not None:
        in_own_process(check_tasks, settings.lm_eval, f"{run.step}.lm_eval")
    with user_errors(), running_scorers(job) as scorers:
        baselines = Baselines(job) if settings.baseline_tokens else None
        score = score_model(scorers, job, num_bytes, Progress(run.step, sum(span.num_targets for span in spans)))
        outcomes = answer_tasks(scorers, job, questions, f"{run.step}_tasks")
        harness = in_own_process(ask_lm_eval, scorers, job, f"{run.step}.lm_eval") if settings.lm_eval else None
    with user_errors():
        facts: dict[str, JsonValue] = {
            "model_kind": model.kind,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
            "bytes": score.bytes,
            **(baselines.facts(num_bytes) if baselines else {}),
        }
    if questions:
        facts["tasks"] = {
            task.settings.name: score_task(task, own) for task, own in zip(questions, outcomes, strict=True)
        }
        write_outcomes(run.path(OUTCOMES_FILE), [own for task in outcomes for own in task])
    if harness is not None:
        facts["lm_eval"] = harness
    if ratings is not None:
        facts["ratings"] = ratings
    report = {**facts, "model": model.uri, "shards": shards.uri, "settings": dataclasses.asdict(settings)}
    storage.write_bytes(run.path("report.json"), json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    log_table(report_rows(facts))
    return run.commit(facts, seconds=time.monotonic() - started, sources=fingerprint_tasks(settings))


def ask_tasks(settings: EvaluateSettings, model: Artifact, step: str) -> list[AskedTask]:
    """Read the tasks' questions, and encode them as the model reads them.

    Raises:
        InputError: a file or an item is damaged, or a question does not fit the model; the message names it.
        ConfigError: a package that a metric needs is not installed, or a task is a chat and the model has no template.
    """
    if not settings.tasks:
        return []
    tokenizer = load_tokenizer(model.path(MODEL_FOLDER, "tokenizer.json"))
    chat = open_chat(model, tokenizer)
    for i, task in enumerate(settings.tasks):
        if task.generate is not None and "bleu" in task.generate.metrics:
            check_sacrebleu(f"{step}.tasks.{i}.generate.metrics")
        if task.chat and chat is None:
            raise _no_template(model, f"{step}.tasks.{i}", "chat")
    return [
        ask_task(number, task, read_questions(task), tokenizer, settings.seq_len, chat)
        for number, task in enumerate(settings.tasks)
    ]


def check_lm_eval_chats(settings: EvaluateSettings, model: Artifact, step: str) -> None:
    """Refuse lm-evaluation-harness's tasks as chats with a model that has no chat template."""
    if settings.lm_eval is not None and settings.lm_eval.apply_chat_template:
        tokenizer = load_tokenizer(model.path(MODEL_FOLDER, "tokenizer.json"))
        if open_chat(model, tokenizer) is None:
            raise _no_template(model, f"{step}.lm_eval", "apply_chat_template")


def _no_template(model: Artifact, where: str, name: str) -> ConfigError:
    allowed = f"needs a chat template, which the model {model.uri} does not have"
    action = f"evaluate a model that was trained on shards of tokenize_chat, or leave {name} out"
    return ConfigError(f"{where}.{name}", True, allowed, action)


def score_ratings(settings: EvaluateSettings, model: Artifact, step: str) -> dict[str, JsonValue] | None:
    """Return what people's ratings say of the model, or None where there are none.

    Raises:
        InputError: a file or a line is damaged, or none is of this model; the message names it.
    """
    if settings.ratings is None:
        return None
    field = f"{step}.ratings"
    return summarise_ratings(read_ratings(settings.ratings, field), model.digest, field)


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
    return Score(nats=math.fsum(nats), tokens=tokens, bytes=num_bytes)


def answer_tasks(
    scorers: list[Any], job: EvaluateJob, tasks: Sequence[AskedTask], progress_name: str
) -> list[list[Outcome]]:
    """Deal the tasks' batches to the actors and return what came of each task's questions.

    Batches follow from the questions and `micro_batch`, never from who is free, so that any number of actors gives
    the same.
    """
    vocab_size = json.loads(storage.read_bytes(job.model.path(MODEL_FOLDER, "config.json")))["vocab_size"]
    batches = plan_work(tasks, job.settings.micro_batch, vocab_size)
    results = answer_batches(scorers, batches, Progress(progress_name, len(batches)).update)
    return [judge(number, task, results) for number, task in enumerate(tasks)]


def in_own_process(work: Callable[..., T], *arguments: Any) -> T:
    """Return what some work with lm-evaluation-harness gives, in a process without the network beside the actors."""
    remote = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": OFFLINE})(work)
    with user_errors():
        result: T = ray.get(remote.remote(*arguments))
    return result


def ask_lm_eval(scorers: list[Any], job: EvaluateJob, field: str) -> dict[str, JsonValue]:
    """Run the harness's tasks with the model that the actors hold."""
    assert job.settings.lm_eval is not None
    tokenizer = load_tokenizer(job.model.path(MODEL_FOLDER, "tokenizer.json"))
    answers = LmEvalAnswers(
        lambda batches: answer_batches(scorers, batches),
        tokenizer,
        seq_len=job.settings.seq_len,
        micro_batch=job.settings.micro_batch,
        encoder=open_chat(job.model, tokenizer),
    )
    return run_harness(answers, job.settings.lm_eval, field)


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
