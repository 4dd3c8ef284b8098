"""The training loop, one process's part of it. It knows DeepSpeed by `Engine` and Ray only by `Host`."""

import math
import time
import warnings
from contextlib import closing
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds import storage
from ray_ds.config.model_size import flops_per_token
from ray_ds.data.rows import Rows
from ray_ds.data.teacher_logits import StoredLogits
from ray_ds.logs import log_event
from ray_ds.model.balance import expert_load, reset_expert_load, update_router_bias
from ray_ds.model.documents import number_documents
from ray_ds.train.agreement import Agreement, Word
from ray_ds.train.bad_steps import BadSteps
from ray_ds.train.batches import Batches, open_task_rows, validation_batches
from ray_ds.train.checkpoints import METRICS
from ray_ds.train.export import export_model
from ray_ds.train.goodput import Goodput, read_attempts, write_attempts
from ray_ds.train.host import Host
from ray_ds.train.metrics import (
    MetricsLog,
    Record,
    Work,
    draw_curve,
    encode,
    load_figures,
    peak_flops,
    peak_memory,
    summarise,
)
from ray_ds.train.objective import MicroBatch
from ray_ds.train.profile import StepProfiler
from ray_ds.train.safekeeping import Progress, Safekeeping
from ray_ds.train.schedule import lr_factor
from ray_ds.train.start import DTYPES, make_objective
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from ray_ds.train.tracker_kinds import TrackedRun
from ray_ds.train.trackers import Trackers
from ray_ds.train.zero.engine import Engine, StepResult

ATTEMPTS = "attempts.jsonl"
PROFILE = "profile"


def train(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Train from the newest safe state, or from the start, to the last step; write the model; return its facts.

    Raises:
        FloatingPointError: a step was bad, and the settings give up then.
        ArtifactError: shards or checkpoints are damaged.
    """
    with closing(TrainLoop(task, host)) as loop:
        loop.resume()
        while loop.step < task.settings.num_steps:
            if loop.run_step():
                host.safe(loop.step)
                loop.store()
                return Stopped(step=loop.step)
        return loop.finish()


def _is_due(every: int, done: int, is_last: bool) -> bool:
    """Tell whether something that happens every so many steps, if at all, and after the last one happens now."""
    return every > 0 and (is_last or done % every == 0)


class TrainLoop:
    """What a training process holds between steps: the number of steps done and the number of the next batch."""

    def __init__(self, task: TrainTask, host: Host) -> None:
        """Build the model, the same on every process, and open the shards."""
        settings = task.settings
        _prepare_process(settings.threads_per_worker, host.device)
        self.task, self.settings, self.host = task, settings, host
        self.step, self.cursor = 0, 0
        host.beat("building the model")
        self.objective = make_objective(task, host.device)
        self.decoder = self.objective.decoder
        self.engine = Engine(self.objective, settings, device=host.device, world_size=host.world_size)
        rows, teacher = open_task_rows(task, "train")
        self.batches = Batches(rows, settings, **self._reader(), device=host.device, teacher=teacher)
        self.safekeeping = Safekeeping(task, self.engine, host)
        self.profiler = StepProfiler(
            settings.profile_steps, folder=storage.join(task.output, PROFILE), rank=host.rank, device=host.device
        )
        self._work = Work(
            batch_tokens=settings.batch_tokens,
            flops_per_token=flops_per_token(task.config, settings.seq_len),
            world_size=host.world_size,
            peak_flops=peak_flops(host.device, DTYPES[settings.precision]),
        )
        self._step_s, self._other_s = 0.0, 0.0
        self._record: Record = {}
        self._terms = 1
        self.metrics = MetricsLog([], None)
        self.trackers: Trackers | None = None

    def _reader(self) -> dict[str, int]:
        """Return this process's place among those that train on different rows: a group that divides them is one."""
        return {"rank": self.engine.mesh.reader, "world_size": self.engine.mesh.num_readers}

    def resume(self) -> None:
        """Go on from the newest safe state, if there is one."""
        self.host.beat("loading the state")
        progress = self.safekeeping.restore() or Progress(step=0, cursor=0, records=[])
        self.step, self.cursor = progress.step, progress.cursor
        is_first = self.host.rank == 0
        root = self.task.checkpoints
        is_watched = is_first and not storage.is_remote(root)
        live_file = storage.local_path(root).with_name(METRICS) if is_watched else None
        self.metrics = MetricsLog(progress.records, live_file)
        attempts_file = storage.join(root, ATTEMPTS)
        self.goodput = Goodput(
            progress.records,
            read_attempts(attempts_file),
            now=time.time(),
            job_started=self.task.job_started,
            last_sign=self.metrics.last_sign,
            world_size=self.host.world_size,
        )
        if is_first:
            write_attempts(attempts_file, self.goodput.attempts)
            run = TrackedRun(output=self.task.output, settings=self.task.settings_json(), steps_done=self.step)
            self.trackers = Trackers(self.settings.trackers, run)
        self.bad_steps = BadSteps(self.settings, progress.records, count=progress.bad_steps)
        self.batches.read_ahead(self.cursor)

    def run_step(self) -> bool:
        """Train on one batch and keep what is due; tell whether the state is safe and training is to pause or end."""
        started = time.perf_counter()
        number = self.step + 1
        with self.profiler.step(number):
            agreement = Agreement(self._forward_backward(number), self._word())
            word = self._update(number, agreement, started)
        if word is None:
            return False
        self._step_s = time.perf_counter() - started
        self._validate_and_show()
        self.host.beat("keeping the state")
        with self.profiler.phase("keep"):
            is_safe = self.safekeeping.keep(self._progress(), word, is_last=self.step == self.settings.num_steps)
        self._other_s = time.perf_counter() - started - self._step_s - self.safekeeping.snapshot_s
        return is_safe

    def store(self) -> None:
        """Bring the state to storage, for training will not go on here: what is in memory ends with the job."""
        self.safekeeping.store(self._progress())

    def _progress(self) -> Progress:
        return Progress(
            step=self.step, cursor=self.cursor, records=self.metrics.records, bad_steps=self.bad_steps.count
        )

    def _word(self) -> Word:
        """Return what this process has to say in a step, of the step before."""
        return Word(
            request=self.host.request(),
            has_failed=self.safekeeping.has_failed,
            is_sending=self.safekeeping.was_sending(),
            step_s=self._step_s,
            stall_s=self.safekeeping.snapshot_s,
            other_s=self._other_s,
            memory_bytes=peak_memory(self.host.device),
        )

    def _forward_backward(self, number: int) -> Tensor:
        """Add up the gradient of this process's micro-batches; return their summed loss and figures, (1 + F,), fp64."""
        sums = torch.zeros(1 + len(self.objective.figures), dtype=torch.double, device=self.host.device)
        self._terms = self.batches.terms(self.cursor)
        with self.profiler.phase("forward_backward"):
            for place, batch in enumerate(self.batches.of_batch(self.cursor)):
                self.host.beat(f"step {number} micro-batch {place + 1}")
                if batch.index is not None:
                    _seed(self.settings.seed, self.cursor, batch.index)
                sums += self.engine.forward_backward(self._masked(batch), terms=self._terms)
        self.host.beat(f"step {number} gradients")
        return sums

    def _masked(self, batch: MicroBatch) -> MicroBatch:
        """Return a stream's rows with the numbers of their documents, where attention is to stay within these."""
        if not self.settings.document_mask:
            return batch
        return batch._replace(segments=number_documents(batch.tokens, self.task.bos_token_id))

    def _update(self, number: int, agreement: Agreement, started: float) -> Word | None:
        """Update the weights and make the step's record; return the common word, or None where it was rolled back."""
        factor = lr_factor(self.step, self.settings.num_steps, self.settings.schedule)
        result: StepResult | None = None
        with self.profiler.phase("optimizer"):
            if self.settings.bad_loss == "fail":  # a bad step is the last, so the device need not wait for the verdict
                result = self.engine.step(factor)
            sums, word = agreement.read()
            means = [total / self._terms for total in sums]
            names = ("loss", *self.objective.figures)  # an objective may say what is to be called its loss
            figures: dict[str, float | int | bool] = dict(zip(names, means, strict=True))
            loss = float(figures["loss"])
            reason = self.bad_steps.judge(loss)
            if reason is not None and result is None:
                self.engine.skip_step()
            elif result is None:
                result = self.engine.step(factor)
            load = self._take_expert_load()
        is_fp16 = self.settings.precision == "fp16"
        if reason is None and result is not None and result.is_skipped and not is_fp16:
            reason = "the gradient is no number"  # DeepSpeed drops it too; no smaller loss scale mends the next one
        if reason is not None:
            self.bad_steps.add(number, reason)
            log_event("bad_step", step=number, cursor=self.cursor, reason=reason, action=self.settings.bad_loss)
            if self.settings.bad_loss == "roll_back":
                self._roll_back()
                return None
        figures["lr"] = self.settings.optimizer.lr * factor
        if self.task.rows != "stream":
            figures["terms"] = self._terms
        if reason is not None or result is None:
            figures |= {"grad_norm": math.nan, "is_skipped": True}
        else:
            figures["grad_norm"] = result.grad_norm
            if is_fp16:
                figures |= {"loss_scale": result.loss_scale, "is_skipped": result.is_skipped}
            figures |= self._balance_experts(load)
        self.step, self.cursor = self.step + 1, self.cursor + 1
        self._record = self._make_record(figures, word, time.perf_counter() - started)
        return word

    def _make_record(self, figures: Record, word: Word, seconds: float) -> Record:
        """Return all that is known of a step that was just done."""
        stalls = {"checkpoint_s": self.safekeeping.checkpoint_s, "snapshot_s": self.safekeeping.snapshot_s}
        return {
            **self._work.figures(self.step, seconds),
            **figures,
            **{name: value for name, value in stalls.items() if value},
            "memory_bytes": word.memory_bytes,
            **self.goodput.count(seconds, now=time.time(), is_skipped=bool(figures.get("is_skipped"))),
        }

    def _balance_experts(self, load: Tensor) -> dict[str, float]:
        """Move the routers' biases by the load of all processes; return its figures."""
        if not load.numel():
            return {}
        if self.settings.router_bias_speed is not None:  # settings fill it in where routers have a bias
            update_router_bias(self.decoder, load, self.settings.router_bias_speed)
        return load_figures(load)

    def _take_expert_load(self) -> Tensor:
        """Return tokens by expert of all processes, (MoE layers, E) or empty, and start counting anew."""
        load = expert_load(self.decoder)
        if load.numel():
            dist.all_reduce(load)
            reset_expert_load(self.decoder)
        return load

    def _roll_back(self) -> None:
        """Go back to the newest safe state, and on with the batch after the bad one."""
        behind = self.cursor + 1
        progress = self.safekeeping.go_back()
        if progress is None:
            action = "lower checkpoint_every or the learning rate"
            raise FloatingPointError(f"step {self.step + 1} is bad and there is no checkpoint to go back to; {action}")
        self.step, self.cursor = progress.step, behind
        self.metrics.go_back(progress.step)
        self.bad_steps.start_behind(self.metrics.records)
        self.goodput.go_back(self.metrics.records, now=time.time())

    def _validate_and_show(self) -> None:
        """Look at the validation loss where that is due, and show the step to who watches."""
        is_last = self.step == self.settings.num_steps
        if _is_due(self.settings.validate_every, self.step, is_last):
            self._record = {**self._record, "validation_loss": self.validation_loss()}
        self.metrics.append(self._record)
        if self.trackers is not None:
            self.trackers.log(self._record)
        if "validation_loss" in self._record or _is_due(self.settings.log_every, self.step, is_last):
            self.host.report(self._record)

    @cached_property
    def validation(self) -> tuple[Rows, StoredLogits | None]:
        """The rows of the validation split and what a teacher said to them, opened at the first look."""
        return open_task_rows(self.task, "validation")

    def validation_loss(self) -> float:
        """Return the loss on rows of the validation split, a mean over targets or pairs."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.host.device)
        rows, teacher = self.validation
        reader = self._reader()
        for batch in validation_batches(rows, self.settings, **reader, device=self.host.device, teacher=teacher):
            self.host.beat("validation")
            sums[0] += self.engine.loss(self._masked(batch))
            sums[1] += batch.terms / self.engine.mesh.rows_shared_by
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def finish(self) -> TrainResult:
        """Write the model and its metrics into the artefact's folder and return the run's facts."""
        self.host.beat("writing the model")
        self.safekeeping.finish()
        state: dict[str, Tensor] = self.engine.full_state()
        records: list[Record] = self.metrics.records
        if self.host.rank == 0:
            self.host.check_alone()
            export_model(state, self.task, DTYPES[self.settings.precision])
            storage.write_bytes(storage.join(self.task.output, METRICS), encode(records).encode())
            storage.write_bytes(storage.join(self.task.output, "curve.png"), draw_curve(records))
        dist.barrier()
        return TrainResult(**summarise(records))

    def close(self) -> None:
        """End what runs beside the loop."""
        self.profiler.close()
        self.batches.close()
        self.metrics.close()
        if self.trackers is not None:
            self.trackers.close(is_finished=self.step == self.settings.num_steps)


def _seed(seed: int, cursor: int, index: int) -> None:
    """Make the random numbers of a micro-batch depend on its place in the data alone, not on who computes it when.

    So no state of a generator has to be kept: it follows from the cursor.
    """
    torch.manual_seed((seed * 1_000_003 + cursor) * 65_537 + index)


def _prepare_process(threads: int, device: torch.device) -> None:
    """Give torch its threads and its device, and silence what it says a hundred times a step."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
