"""The training loop, one process's part of it. It knows DeepSpeed by `Engine` and Ray only by `Host`."""

import math
import time
import warnings
from contextlib import closing

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds import storage
from ray_ds.config.model_size import flops_per_token
from ray_ds.logs import log_event
from ray_ds.train.agreement import Agreement, Word
from ray_ds.train.arrival import Arrival
from ray_ds.train.bad_steps import BadSteps
from ray_ds.train.best import load_best
from ray_ds.train.checkpoints import METRICS
from ray_ds.train.export import export_model
from ray_ds.train.goodput import ATTEMPTS, Goodput, read_attempts, write_attempts
from ray_ds.train.host import Host, Request
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
from ray_ds.train.profile import StepProfiler
from ray_ds.train.safekeeping import Progress, Safekeeping
from ray_ds.train.schedule import lr_factor
from ray_ds.train.start import DTYPES
from ray_ds.train.stepper import Stepper
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from ray_ds.train.tracker_kinds import TrackedRun
from ray_ds.train.trackers import Trackers
from ray_ds.train.zero.engine import StepResult

PROFILE = "profile"


def train(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Train from the newest safe state, or from the start, to the last step; write the model; return its facts.

    Raises:
        FloatingPointError: a step was bad, and the settings give up then.
        ArtifactError: shards or checkpoints are damaged.
    """
    with closing(Trainer(task, host)) as loop:
        loop.resume()
        while loop.step < task.settings.num_steps:
            request = loop.run_step()
            while request is not Request.NONE:
                request = host.safe(loop.step, request)
                loop.store()
                if request is Request.STOP:
                    return Stopped(step=loop.step)
        return loop.finish()


def _is_due(every: int, done: int, is_last: bool) -> bool:
    """Tell whether something that happens every so many steps, if at all, and after the last one happens now."""
    return every > 0 and (is_last or done % every == 0)


class Trainer:
    """What a training process holds between steps: the number of steps done and the number of the next batch."""

    def __init__(self, task: TrainTask, host: Host) -> None:
        """Build the model, the same on every process, and open the shards."""
        settings = task.settings
        _prepare_process(settings.threads_per_worker, host.device)
        self.task, self.settings, self.host = task, settings, host
        self.step, self.cursor = 0, 0
        host.beat("building the model")
        self.stepper = Stepper(task, host)
        self.safekeeping = Safekeeping(task, self.stepper.engine, host)
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
        self.metrics = MetricsLog([], None)
        self.trackers: Trackers | None = None

    def resume(self) -> None:
        """Go on from the newest safe state, or from first weights if there is none."""
        self.host.beat("loading the state")
        progress = self.safekeeping.restore()
        if progress is None:
            self.stepper.start_anew()
            progress = Progress(step=0, cursor=0, records=[])
        self.step, self.cursor = progress.step, progress.cursor
        is_first = self.host.rank == 0
        root = self.task.checkpoints
        is_watched = is_first and not storage.is_remote(root)
        live_file = storage.local_path(root).with_name(METRICS) if is_watched else None
        if is_first:
            self.host.check_alone()  # the metrics and the attempts are written over
        self.metrics = MetricsLog(progress.records, live_file)
        attempts_file = storage.join(root, ATTEMPTS)
        self.goodput = Goodput(
            progress.records,
            read_attempts(attempts_file),
            now=time.time(),
            job_started=self.task.job_started,
            last_sign=self.metrics.last_sign,
            world_size=self.host.world_size,
            device=self.host.device.type,
        )
        if is_first:
            write_attempts(attempts_file, self.goodput.attempts)
            run = TrackedRun(output=self.task.output, settings=self.task.settings_json(), steps_done=self.step)
            self.trackers = Trackers(self.settings.trackers, run)
        self.bad_steps = BadSteps(self.settings, progress.records, count=progress.bad_steps)
        self.stepper.batches.read_ahead(self.cursor)

    def run_step(self) -> Request:
        """Train on one batch and keep what is due; return what was asked for, for which the state is safe now."""
        started = time.perf_counter()
        number = self.step + 1
        with self.profiler.step(number):
            with self.profiler.phase("forward_backward"):
                sums, terms = self.stepper.forward_backward(number, self.cursor)
            word = self._update(number, Agreement(sums, self._word()), terms, started)
        if word is None:
            return Request.NONE
        self._step_s = time.perf_counter() - started
        self._validate_and_show()
        self.host.beat("keeping the state")
        with self.profiler.phase("keep"):
            asked = self.safekeeping.keep(self._progress(), word, is_last=self.step == self.settings.num_steps)
        self._other_s = time.perf_counter() - started - self._step_s - self.safekeeping.snapshot_s
        return asked

    def store(self) -> None:
        """Bring the state to storage, for training will not go on here: what is in memory may go with the nodes."""
        self.host.beat("keeping the state")
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

    def _update(self, number: int, agreement: Agreement, terms: int, started: float) -> Word | None:
        """Update the weights and make the step's record; return the common word, or None where it was rolled back."""
        factor = lr_factor(self.step, self.settings.num_steps, self.settings.schedule)
        updated: tuple[StepResult, Arrival] | None = None
        with self.profiler.phase("optimizer"):
            if self.settings.bad_loss == "fail":  # a bad step is the last, so the device need not wait for the verdict
                updated = self.stepper.update(factor)
                if not self._has_work_behind(number):
                    self.stepper.run_ahead(number + 1, self.cursor + 1)
            sums, word = agreement.read()
            means = [total / terms for total in sums]
            names = ("loss", *self.stepper.objective.figures)  # an objective may say what is to be called its loss
            figures: dict[str, float | int | bool] = dict(zip(names, means, strict=True))
            reason = self.bad_steps.judge(float(figures["loss"]))
            if updated is None and reason is None:
                updated = self.stepper.update(factor)
            elif updated is None:
                self.stepper.skip_update()
        if reason is None and updated is not None and self.stepper.is_no_number(updated[0]):
            reason = "the gradient is no number"  # DeepSpeed drops it too; no smaller loss scale mends the next one
        if reason is not None:
            self.bad_steps.add(number, reason)
            log_event("bad_step", step=number, cursor=self.cursor, reason=reason, action=self.settings.bad_loss)
            if self.settings.bad_loss == "roll_back":
                self._roll_back()
                return None
        figures["lr"] = self.settings.optimizer.lr * factor
        if self.task.rows != "stream":
            figures["terms"] = terms
        if reason is not None or updated is None:
            figures |= {"grad_norm": math.nan, "is_skipped": True}
        else:
            result, load = updated
            figures["grad_norm"] = result.grad_norm
            if self.settings.precision == "fp16":
                figures |= {"loss_scale": result.loss_scale, "is_skipped": result.is_skipped}
            figures |= load_figures(load.read())
        self.step, self.cursor = self.step + 1, self.cursor + 1
        self._record = self._make_record(figures, word, time.perf_counter() - started)
        return word

    def _has_work_behind(self, number: int) -> bool:
        """Tell whether the device has something else to do after a step than the next one."""
        is_last = number == self.settings.num_steps
        looks = _is_due(self.settings.validate_every, number, is_last)
        return is_last or looks or _is_due(self.settings.checkpoint_every, number, is_last)

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
            self._record = {**self._record, "validation_loss": self.stepper.validation_loss()}
        self.metrics.append(self._record)
        if self.trackers is not None:
            self.trackers.log(self._record)
        if "validation_loss" in self._record or _is_due(self.settings.log_every, self.step, is_last):
            self.host.report(self._record)

    def finish(self) -> TrainResult:
        """Write the last model, or the best, and the metrics into the artefact's folder; return the run's facts."""
        self.host.beat("writing the model")
        self.safekeeping.finish()
        model_step = self.step
        if self.settings.keep_best:
            model_step = load_best(self.task, self.stepper.engine, self.host)
        state: dict[str, Tensor] = self.stepper.engine.full_state()
        records: list[Record] = self.metrics.records
        if self.host.rank == 0:
            self.host.check_alone()
            export_model(state, self.task, DTYPES[self.settings.precision])
            storage.write_bytes(storage.join(self.task.output, METRICS), encode(records).encode())
            storage.write_bytes(storage.join(self.task.output, "curve.png"), draw_curve(records))
        dist.barrier()
        return TrainResult(**summarise(records, model_step=model_step))

    def close(self) -> None:
        """End what runs beside the loop."""
        self.profiler.close()
        self.stepper.close()
        self.metrics.close()
        if self.trackers is not None:
            self.trackers.close(is_finished=self.step == self.settings.num_steps)


def _prepare_process(threads: int, device: torch.device) -> None:
    """Give torch its threads and its device, and silence what it says a hundred times a step."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
