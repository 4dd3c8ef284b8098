"""The device's part of a step: forward, backward, update. What came of it is read when it is there."""

import math
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import Rows
from ray_ds.data.stored_rows import StoredRows
from ray_ds.model.balance import expert_load, reset_expert_load, update_router_bias
from ray_ds.train.arrival import Arrival
from ray_ds.train.batch_pass import BatchPass, masked
from ray_ds.train.batches import Batches, open_task_rows, validation_batches
from ray_ds.train.first_state import FirstState
from ray_ds.train.host import Host
from ray_ds.train.start import DTYPES, first_weights, make_objective
from ray_ds.train.task import TrainTask
from ray_ds.train.zero.engine import Engine, StepResult


def may_run_ahead(settings: TrainSettings, device: torch.device) -> bool:
    """Tell whether a step's first micro-batch may begin before the step before was judged and its state was kept.

    Not where a bad step is undone, nor where gradients change what is kept: Muon's momentum in ZeRO 3, and gradients
    that go to host memory. On a CPU there is nothing to gain.
    """
    moves_momentum = settings.zero_stage == 3 and settings.optimizer.kind == "muon"
    changes_state = settings.offload != "none" or moves_momentum
    return device.type == "cuda" and settings.bad_loss == "fail" and not changes_state


class Stepper:
    """The model with its engine and its data, the same on every process."""

    def __init__(self, task: TrainTask, host: Host) -> None:
        """Build the model, its values unset, and open the shards."""
        settings = task.settings
        self._task, self._settings, self._host = task, settings, host
        self.objective = make_objective(task, host.device)
        self.decoder = self.objective.decoder
        self.engine = Engine(self.objective, settings, device=host.device, world_size=host.world_size)
        # A group that divides its rows reads them as one.
        self._reader = {"rank": self.engine.mesh.reader, "world_size": self.engine.mesh.num_readers}
        rows, stored = open_task_rows(task, "train")
        self.batches = Batches(rows, settings, **self._reader, device=host.device, stored=stored)
        self._is_fp16 = settings.precision == "fp16"
        self._runs_ahead = may_run_ahead(settings, host.device)
        self._ahead: BatchPass | None = None

    def start_anew(self) -> None:
        """Give the model its first weights; all processes call this together.

        Raises:
            ArtifactError: the checkpoint that is started from is damaged.
        """
        if self._settings.lora is None:  # adapters have theirs, and the weights beside them
            dtype = DTYPES[self._settings.precision]
            self.engine.load_state(FirstState(first_weights(self._task), dtype, self.engine.state().facts))

    def forward_backward(self, number: int, cursor: int) -> tuple[Tensor, int]:
        """Add up the gradient of this process's micro-batches.

        Args:
            number: of the step, from 1.
            cursor: number of the batch.
        Returns:
            Their summed loss and figures, (1 + F,), fp64, and what the step's loss is divided by.
        """
        begun, self._ahead = self._ahead, None
        passed = begun or self._begin(number, cursor)
        return passed.finish(), passed.terms

    def run_ahead(self, number: int, cursor: int) -> None:
        """Launch the first micro-batch of a step behind the update before it, where that may be done.

        While the device computes it, this process reads what came of that update, keeps the state and prepares the
        rest. Without it the device stands still for 6 to 10 ms a step: 5 % of one that takes 160 ms (H200, 369 M
        parameters, one micro-batch a step).
        """
        if self._runs_ahead:
            self._ahead = self._begin(number, cursor)
            self._ahead.advance()

    def _begin(self, number: int, cursor: int) -> BatchPass:
        return BatchPass(number, cursor, self._task, self._host, self.engine, self.batches)

    def update(self, lr_factor: float) -> tuple[StepResult, Arrival]:
        """Update the weights and the routers' biases.

        Returns:
            What the optimizer did, and tokens by expert of all processes, (MoE layers, E) or empty; counting starts
            anew.
        """
        result = self.engine.step(lr_factor)
        load = expert_load(self.decoder)
        if load.numel():
            dist.all_reduce(load)
            reset_expert_load(self.decoder)
            speed = self._settings.router_bias_speed  # settings fill it in where routers have a bias
            if speed is not None and (self._is_fp16 or not result.is_skipped):
                update_router_bias(self.decoder, load, speed)
        return result, Arrival(load)

    def is_no_number(self, result: StepResult) -> bool:
        """Tell whether a step's gradient was no number; fp16 drops some such steps to find its loss scale."""
        return not self._is_fp16 and not math.isfinite(result.grad_norm)

    def skip_update(self) -> None:
        """Drop the gradient and leave all else as it was before the step."""
        self.engine.skip_step()
        reset_expert_load(self.decoder)

    @cached_property
    def _validation(self) -> tuple[Rows, StoredRows | None]:
        """The rows of the validation split and what was stored for them, opened at the first look."""
        return open_task_rows(self._task, "validation")

    def validation_loss(self) -> float:
        """Return the loss on rows of the validation split, a mean over targets or pairs."""
        device = self._host.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        rows, stored = self._validation
        for batch in validation_batches(rows, self._settings, **self._reader, device=device, stored=stored):
            self._host.beat("validation")
            sums[0] += self.engine.loss(masked(batch, self._task))
            sums[1] += batch.terms / self.engine.mesh.rows_shared_by
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def close(self) -> None:
        """End the threads that read ahead."""
        self.batches.close()
