"""A look at a few steps by torch's profiler: a trace and a table of each process."""

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ray_ds import storage
from ray_ds.logs import log_event

TABLE_ROWS = 60
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class StepProfiler:
    """Profiles the steps from `first` to `last`, as far as this process runs them; costs nothing at other steps.

    Steps that run again after a restart are profiled again, and their files take the place of the earlier ones.
    """

    def __init__(self, steps: tuple[int, int] | None, *, folder: str, rank: int, device: torch.device) -> None:
        """Plan to write into `folder`, which may be on an object store."""
        self._steps = steps
        self._folder, self._rank, self._device = folder, rank, device
        self._profile: profile | None = None
        self._first = 0

    @contextlib.contextmanager
    def _watch(self, step: int) -> Iterator[None]:
        if self._profile is None:
            self._start(step)
        yield
        if self._profile is not None:
            self._synchronize()
            self._profile.step()
            if self._steps is not None and step >= self._steps[1]:
                self.close()

    def step(self, step: int) -> AbstractContextManager[None]:
        """Return a context for a step, counted from 1, with all that belongs to it."""
        if self._steps is None or not self._steps[0] - 1 <= step <= self._steps[1]:
            return _NOTHING
        return self._watch(step)

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Return a context that names a part of a step in the trace, such as `forward_backward`."""
        return _NOTHING if self._profile is None else record_function(name)

    def close(self) -> None:
        """Write what was profiled, if anything was; also when training ends within the steps."""
        running, self._profile = self._profile, None
        if running is not None:
            self._synchronize()
            running.stop()

    def _start(self, step: int) -> None:
        """Start at the step before the first, if there is one: starting up would distort a step that is measured."""
        assert self._steps is not None
        first, last = self._steps
        self._first = max(step, first)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        plan = schedule(wait=0, warmup=1, active=last - self._first + 1, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()
        if step == self._first:
            self._profile.step()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, result: profile) -> None:
        """Write the trace and the table; a full disk costs the profile, not the training."""
        name = f"steps-{self._first:06d}-rank-{self._rank:05d}"
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json.gz"
                result.export_chrome_trace(str(trace))
                storage.write_bytes(storage.join(self._folder, f"{name}.trace.json.gz"), trace.read_bytes())
            table = result.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
            storage.write_bytes(storage.join(self._folder, f"{name}.txt"), table.encode())
        except OSError as error:
            log_event("profile_not_kept", folder=self._folder, rank=self._rank, error=str(error))
