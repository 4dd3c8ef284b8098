"""The train stage: TokenShards -> Checkpoint, on Ray Train with DeepSpeed; also fine-tuning of a Checkpoint."""

import time
from collections.abc import Mapping
from typing import Literal

import ray
import torch

from ray_ds import storage
from ray_ds.artifacts import Artifact, Checkpoint, ReferenceLogProbs, TeacherLogits, TokenShards
from ray_ds.config.model_size import num_parameters
from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import PackedRows, check_any_row
from ray_ds.data.shards import Split
from ray_ds.errors import ConfigError
from ray_ds.logs import Progress, log_event
from ray_ds.on_ray.autoscaler import nodes_may_come
from ray_ds.on_ray.devices import known_gpu_fleet
from ray_ds.on_ray.gauges import TrainGauges
from ray_ds.on_ray.preflight import check_cluster
from ray_ds.on_ray.stopping import stop_request
from ray_ds.on_ray.trainer import RAY_TRAIN, train_on_ray
from ray_ds.plan.case import case_of
from ray_ds.plan.fit import check_fits
from ray_ds.stage_run import StageRun
from ray_ds.tokenizer import load_tokenizer
from ray_ds.train.batches import check_cache, open_task_rows
from ray_ds.train.checkpoints import METRICS
from ray_ds.train.checkpoints.folders import delete_file
from ray_ds.train.goodput import ATTEMPTS, Attempt, read_attempts
from ray_ds.train.inputs import check_reference, check_row_kind, check_teacher_logits, read_model
from ray_ds.train.metrics import SHOWN
from ray_ds.train.task import TrainTask
from ray_ds.train.trackers import check_trackers

CHECKPOINTS = "checkpoints"
"""Folder of what unfinished training goes on from."""
Device = Literal["cpu", "cuda"]


def train(settings: TrainSettings, run: StageRun) -> Artifact:
    """Train the model to the last step, from a checkpoint of the same run if there is one."""
    started = time.monotonic()
    shards = run.input(TokenShards)
    task = make_task(settings, shards, run)
    check_task(task, run)
    progress = Progress(run.step, settings.num_steps)
    gauges = TrainGauges(f"{run.step}-{run.digest[:8]}")

    latest: dict[str, float] = {}  # a progress line comes every few seconds, and not every record has every figure

    def show(record: Mapping[str, float]) -> None:
        gauges.show(record)
        latest.update(record)
        progress.update(int(record["step"]), **{name: latest[name] for name in SHOWN if name in latest})

    with stop_request() as stop:
        result = train_on_ray(task, work=run.work_path(), on_report=show, stop=stop, check_alone=run.check_alone)
    log_event("trained", **vars(result))
    facts = {
        **vars(result),
        "parameters": num_parameters(task.config),
        "tokenizer_digest": shards.fact("tokenizer_digest"),
        "zero_stage": settings.zero_stage,
        "precision": settings.precision,
        "world_size": settings.num_workers if isinstance(settings.num_workers, int) else list(settings.worker_range),
    }
    artifact = run.commit(facts, seconds=time.monotonic() - started)
    for name in (CHECKPOINTS, RAY_TRAIN):  # stack traces of what hung stay, and so does the job's lease
        storage.delete_folder(run.work_path(name))
    delete_file(run.work_path(METRICS))
    return artifact


def make_task(settings: TrainSettings, shards: TokenShards, run: StageRun) -> TrainTask:
    """Return what the workers are told.

    Raises:
        ArtifactError: a checkpoint, or what was stored of one, does not go with the shards.
        ConfigError: rows are longer than the model takes, or the objective wants other shards.
    """
    tokenizer = load_tokenizer(shards.path("tokenizer.json"))
    last = last_attempt(run)
    start, teacher, reference = (run.named.get(name) for name in ("init_from", "teacher", "reference"))
    if start is not None:
        config = read_model(start, shards, seq_len=settings.seq_len, step=run.step)
        settings = settings.for_model(config)
    else:
        config = settings.new_model(shards.fact("vocab_size"))
    if isinstance(teacher, TeacherLogits):
        check_teacher_logits(teacher, shards, settings, run.step)
    elif teacher is not None:
        read_model(teacher, shards, seq_len=settings.seq_len, step=run.step)
    if isinstance(reference, ReferenceLogProbs):
        assert isinstance(start, Checkpoint), "the recipe was checked"
        check_reference(reference, start, shards, settings, run.step)
    return TrainTask(
        settings=settings,
        config=config,
        shards=shards.uri,
        rows=check_row_kind(shards, settings, run.step),
        init_from=None if start is None else start.uri,
        teacher=teacher.uri if isinstance(teacher, Checkpoint) else None,
        teacher_logits=teacher.uri if isinstance(teacher, TeacherLogits) else None,
        reference_log_probs=None if reference is None else reference.uri,
        checkpoints=run.work_path(CHECKPOINTS),
        output=run.uri,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        device=choose_device(settings, run.step, had=None if last is None else last.device),
        job_started=time.time(),
    )


def last_attempt(run: StageRun) -> Attempt | None:
    """Return the newest group of workers that trained in this run, whose nodes may be lost; None where it is new."""
    attempts = read_attempts(run.work_path(CHECKPOINTS, ATTEMPTS))
    return attempts[-1] if attempts else None


def choose_device(settings: TrainSettings, step: str, *, had: str | None) -> Device:
    """Return what workers compute on.

    Args:
        had: what this run's earlier workers computed on, which counts where the settings leave it open: the nodes with
            the GPUs may be lost just now. None where there were none.
    Raises:
        ConfigError: fp16 is asked for on a CPU without it; or it is left open and no node has a GPU, but more may come.
    """
    device: Device
    if settings.device != "auto":
        device = settings.device
    elif had is not None:
        device = "cuda" if had == "cuda" else "cpu"
    elif ray.cluster_resources().get("GPU", 0) > 0:
        device = "cuda"
    elif nodes_may_come():
        allowed = "must be cuda or cpu where no node has a GPU yet and a node autoscaler may start some that have"
        raise ConfigError(f"{step}.device", settings.device, allowed, f"add --{step}.device=cuda, or cpu")
    else:
        device = "cpu"
    if device == "cpu" and settings.precision == "fp16" and not cpu_has_fp16():
        allowed = "must be bf16 or fp32 on this CPU, which has no fp16 arithmetic"
        raise ConfigError(f"{step}.precision", settings.precision, allowed, "use bf16, or a cluster with GPUs")
    return device


def cpu_has_fp16() -> bool:
    """Tell whether this node's CPU computes in fp16; DeepSpeed asks the same."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def check_task(task: TrainTask, run: StageRun) -> None:
    """Refuse, before any worker starts, what workers would fail at, and shards that are not as they were written."""
    settings = task.settings
    check_trackers(settings.trackers, f"{run.step}.trackers")
    splits: list[Split] = ["train", "validation"] if settings.validate_every else ["train"]
    for split in splits:
        rows, _ = open_task_rows(task, split)
        check_any_row(rows, storage.join(task.shards, split), settings.seq_len)
        if isinstance(rows, PackedRows) and rows.num_dropped:
            log_event("conversations_left_out", split=split, count=rows.num_dropped, longer_than=settings.seq_len + 1)
        if split == "train":
            check_cache(rows.split, settings, field=f"{run.step}.shard_cache_bytes")
    check_cluster(
        run.run_dir,
        num_workers=settings.min_workers,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=1.0 if task.device == "cuda" else 0.0,
        field=f"{run.step}.num_workers",
        has_begun=last_attempt(run) is not None,
    )
    named = run.named.values()
    for checkpoint in (artifact for artifact in named if isinstance(artifact, Checkpoint)):
        checkpoint.verify_files()
    check_memory(task, run.step)
    large = [artifact for artifact in named if isinstance(artifact, TeacherLogits | ReferenceLogProbs)]
    for artifact in (*large, run.input(TokenShards)):  # last, for they are read as a whole
        if not storage.is_remote(artifact.uri):  # those on an object store are checked when a node fetches them
            artifact.verify_files()


def check_memory(task: TrainTask, step: str) -> None:
    """Refuse, before a GPU is taken, what cannot fit it with the fewest workers; GPUs of unknown kind are let pass.

    Raises:
        ConfigError: it cannot.
    """
    fleet = known_gpu_fleet() if task.device == "cuda" else None
    if fleet is not None:
        check_fits(case_of(task.settings, task.config, task.settings.min_workers), fleet, step=step)
