"""The training loop, one process's part of it. It knows DeepSpeed by `Engine` and Ray only by `Host`."""

import math
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.config.model_size import flops_per_token
from ray_ds.logs import log_event
from ray_ds.model.balance import expert_load, max_violation, reset_expert_load, update_router_bias
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.train import checkpoints
from ray_ds.train.batches import Batches, open_split, validation_batches
from ray_ds.train.export import export_model
from ray_ds.train.metrics import MetricsLog, Record, decode, draw_curve, encode, peak_flops
from ray_ds.train.schedule import lr_factor
from ray_ds.train.task import TrainResult, TrainTask
from ray_ds.train.zero.engine import Engine

METRICS = "metrics.jsonl"
LOSS_STEPS = 50
"""Steps whose mean is called the training loss at the end."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Host(Protocol):
    """Where a training process runs. Its default process group is ready when training starts."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world_size(self) -> int:
        """How many processes train together."""

    @property
    def device(self) -> torch.device:
        """What this process computes on."""

    def report(self, record: Mapping[str, float]) -> None:
        """Show a step's figures to who watches the run; every process calls it at the same steps."""


def train(task: TrainTask, host: Host) -> TrainResult:
    """Train from the newest checkpoint, or from the start, to the last step; write the model; return its facts."""
    loop = TrainLoop(task, host)
    for step in range(loop.resume(), task.settings.num_steps):
        record = loop.run_step(step)
        done = step + 1
        is_last = done == task.settings.num_steps
        if _is_due(task.settings.validate_every, done, is_last):
            record = {**record, "validation_loss": loop.validation_loss()}
        loop.metrics.append(record)
        if _is_due(task.settings.log_every, done, is_last):
            host.report(record)
        if _is_due(task.settings.checkpoint_every, done, is_last):
            loop.save(done)
    return loop.finish()


def _is_due(every: int, done: int, is_last: bool) -> bool:
    """Tell whether something that happens every so many steps, if at all, and after the last one happens now."""
    return every > 0 and (is_last or done % every == 0)


class TrainLoop:
    """What a training process holds between steps."""

    def __init__(self, task: TrainTask, host: Host) -> None:
        """Build the model, the same on every process, and open the shards."""
        settings = task.settings
        _prepare_process(settings.threads_per_worker, host.device)
        self.task, self.settings, self.host = task, settings, host
        decoder = Decoder(task.config, recompute_activations=settings.recompute_activations)
        init_weights(decoder, settings.seed)
        self.decoder = decoder
        self.engine = Engine(decoder, settings, device=host.device, world_size=host.world_size)
        split = open_split(task.shards, "train")
        self.batches = Batches(split, settings, rank=host.rank, world_size=host.world_size)
        self.metrics = MetricsLog([], None)
        self.peak = peak_flops(host.device, DTYPES[settings.precision])
        self.flops_per_token = flops_per_token(task.config, settings.seq_len)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one, and return how many steps are done."""
        root, rank = self.task.checkpoints, self.host.rank
        # Only rank 0 reads all files to check them; its word counts, so that all start from the same step.
        found: list[checkpoints.Commit | None] = [checkpoints.find_latest(root) if rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        commit = found[0]
        records: list[Record] = []
        if commit is not None:
            checkpoints.check_world_size(commit, self.host.world_size, root, field="num_workers")
            if rank == 0:
                checkpoints.delete_newer(root, commit.step)
            folder = checkpoints.local_copy(root, commit.step)
            self.engine.load(folder)
            torch.set_rng_state(torch.load(folder / _rng_file(rank)))
            records = decode((folder / METRICS).read_text())
            if rank == 0:
                log_event("resumed", step=commit.step, checkpoint=checkpoints.checkpoint_uri(root, commit.step))
        is_watched = rank == 0 and not storage.is_remote(root)
        live_file = storage.local_path(root).with_name(METRICS) if is_watched else None
        self.metrics = MetricsLog(records, live_file)
        return commit.step if commit is not None else 0

    def run_step(self, step: int) -> Record:
        """Train on one batch and return its figures, the same on every process."""
        started = time.perf_counter()
        factor = lr_factor(step, self.settings.num_steps, self.settings.schedule)
        total = torch.zeros((), device=self.host.device)
        for tokens, targets in self.batches.of_step(step, self.host.device):
            total += self.engine.forward_backward(tokens, targets)
        result = self.engine.step(factor)
        dist.all_reduce(total)
        balance = self._balance_experts()
        loss = total.item() / self.settings.batch_tokens
        # DeepSpeed also skips such steps in fp32 and bf16, where no smaller loss scale would mend the next one.
        is_mended = self.settings.precision == "fp16" and result.is_skipped
        if not math.isfinite(loss) and not is_mended:
            raise FloatingPointError(f"the loss of step {step + 1} is {loss}: lower the learning rate")
        seconds = time.perf_counter() - started
        record: dict[str, float | int | bool] = {
            "step": step + 1,
            "tokens": (step + 1) * self.settings.batch_tokens,
            "loss": loss,
            "lr": self.settings.optimizer.lr * factor,
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "tokens_per_s": self.settings.batch_tokens / seconds,
            **balance,
        }
        if self.peak is not None:
            work = record["tokens_per_s"] * self.flops_per_token
            record["mfu"] = work / (self.peak * self.host.world_size)
        if self.settings.precision == "fp16":
            record |= {"loss_scale": result.loss_scale, "is_skipped": result.is_skipped}
        return record

    def _balance_experts(self) -> dict[str, float]:
        """Move the routers' biases by the load of all processes; return the worst layer's imbalance."""
        load = expert_load(self.decoder)
        if not load.numel():
            return {}
        dist.all_reduce(load)
        speed = self.settings.router_bias_speed
        assert speed is not None, "settings fill it in for a model with experts"
        update_router_bias(self.decoder, load, speed)
        reset_expert_load(self.decoder)
        return {"max_violation": float(max_violation(load).max())}

    def validation_loss(self) -> float:
        """Return the loss on rows of the validation split, in nats a token."""
        split = open_split(self.task.shards, "validation")
        sums = torch.zeros(2, dtype=torch.float64, device=self.host.device)
        world: dict[str, int] = {"rank": self.host.rank, "world_size": self.host.world_size}
        for tokens, targets in validation_batches(split, self.settings, device=self.host.device, **world):
            sums[0] += self.engine.loss(tokens, targets)
            sums[1] += (targets >= 0).sum()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def save(self, step: int) -> None:
        """Write a checkpoint of all state; it counts only once every process's files are safe."""
        root, rank, world_size = self.task.checkpoints, self.host.rank, self.host.world_size
        folder = checkpoints.open_folder(root, step, rank=rank)
        dist.barrier()
        self.engine.save(folder)
        torch.save(torch.get_rng_state(), folder / _rng_file(rank))
        # Every process writes its records in a folder of its own; in a shared folder one set is enough.
        if rank == 0:
            (folder / METRICS).write_text(encode(self.metrics.records))
        dist.barrier()
        mine = checkpoints.seal_files(root, step, folder, rank=rank, world_size=world_size)
        parts: list[list[FileInfo]] = [[] for _ in range(world_size)]
        dist.all_gather_object(parts, mine)
        if rank == 0:
            files = [info for part in parts for info in part]
            keep = self.settings.keep_checkpoints
            checkpoints.commit(root, step, world_size=world_size, files=files, keep=keep)
            log_event("checkpoint", step=step, bytes=sum(info.bytes for info in files))
        dist.barrier()

    def finish(self) -> TrainResult:
        """Write the model and its metrics into the artefact's folder and return the run's facts."""
        state: dict[str, Tensor] = self.engine.full_state()
        records = self.metrics.records
        if self.host.rank == 0:
            export_model(state, self.task, DTYPES[self.settings.precision])
            storage.write_bytes(storage.join(self.task.output, METRICS), encode(records).encode())
            storage.write_bytes(storage.join(self.task.output, "curve.png"), draw_curve(records))
        self.metrics.close()
        dist.barrier()
        looks = [record["validation_loss"] for record in records if "validation_loss" in record]
        return TrainResult(
            step=int(records[-1]["step"]),
            tokens=int(records[-1]["tokens"]),
            train_loss=statistics.fmean(record["loss"] for record in records[-LOSS_STEPS:]),
            validation_loss=looks[-1] if looks else None,
            tokens_per_s=statistics.median(record["tokens_per_s"] for record in records),
            mfu=statistics.median(record["mfu"] for record in records) if "mfu" in records[-1] else None,
        )


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _prepare_process(threads: int, device: torch.device) -> None:
    """Give torch its threads and its device, and silence what it says a hundred times a step."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
