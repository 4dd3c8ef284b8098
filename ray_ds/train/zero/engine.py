"""DeepSpeed behind five verbs: forward_backward, step, skip_step, state, load_state. It trains any objective."""

import contextlib
import logging
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from pydantic import JsonValue
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.model.balance import uncounted
from ray_ds.train.arrival import Arrival
from ray_ds.train.objective import MicroBatch, Objective
from ray_ds.train.parallel.cuts import joined
from ray_ds.train.parallel.divide import divide
from ray_ds.train.parallel.mesh import make_mesh
from ray_ds.train.state import EngineState, StateReader, Stretch
from ray_ds.train.zero.build import use_built_op
from ray_ds.train.zero.config import deepspeed_config
from ray_ds.train.zero.gradient_norm import sum_of_squares
from ray_ds.train.zero.logical import LogicalState
from ray_ds.train.zero.optimizer import make_optimizer
from ray_ds.train.zero.quick_update import use_quick_update
from ray_ds.train.zero.scaler import restore_scaler, scaler_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    norm: Arrival
    is_skipped: bool
    """The gradient was no number and the weights are as before; in fp16 the loss scale is halved,
    save for the first such step since it last grew.

    Where `bad_loss` is `fail` an update in bf16 does not wait for that and this is false: the gradient has spoilt the
    weights, and `grad_norm`, no number either, is how the caller knows that it must not keep them.
    """
    loss_scale: float
    """What fp16 multiplied the loss with; 1 in other types."""

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient over all weights before clipping; with Muon in ZeRO 1-3 of the orthogonalized update.

        Waits until it is here.
        """
        return float(self.norm.read())


class Engine:
    """A model with its optimizer, partitioned over the processes of the default process group."""

    def __init__(self, objective: Objective, settings: TrainSettings, *, device: torch.device, world_size: int) -> None:
        """Hand the model to DeepSpeed; all processes call this together, with equal weights.

        Args:
            objective: its decoder in fp32 on any device; it changes place and type. Weights that are trained may be
                unset until `load_state`. Parameters that want no gradient stay as they are, and are in no state.
        """
        found = get_accelerator().device_name()
        assert found == device.type, f"DeepSpeed took {found}: set DS_ACCELERATOR={device.type} before it is imported"
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs a page about every step of its set-up
        use_built_op()
        self.mesh = make_mesh(settings.parallel, rank=torch.distributed.get_rank(), world_size=world_size)
        self._cuts = divide(objective.decoder, self.mesh)
        self.decoder = decoder = objective.decoder.to(device)
        trained = [(name, parameter) for name, parameter in decoder.named_parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, settings.optimizer, is_cuda=device.type == "cuda")
        config = deepspeed_config(settings, world_size, is_cuda=device.type == "cuda")
        self._has_plain_fp32_optimizer = settings.zero_stage == 0 and settings.precision == "fp32"
        if self._has_plain_fp32_optimizer:
            config["gradient_clipping"] = 0.0  # `step` clips: DeepSpeed's norm of this case adds up in fp32
        self._clipping = settings.gradient_clipping
        self._peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
        with contextlib.redirect_stdout(None):  # it prints that it built the op when it only loads it
            deepspeed.init_distributed(dist_init_required=False)
            mpu = groups.mpu = self.mesh if self._cuts else None  # DeepSpeed keeps the last engine's otherwise
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=optimizer,
                config=config,
                mpu=mpu,
                dist_init_required=False,
            )
        if not self._cuts:
            use_quick_update(self._engine.optimizer, waits=settings.bad_loss != "fail")
        self._zero_stage = settings.zero_stage
        self._is_fp16 = settings.precision == "fp16"
        self._is_micro_batch_open = False
        for name, buffer in decoder.named_buffers():
            assert buffer.dtype in (torch.float32, torch.int64), f"DeepSpeed made {name} {buffer.dtype}"
        self._state = LogicalState(decoder, self._engine, self._cuts)
        if settings.compile:
            self._engine.compile()

    def forward_backward(self, batch: MicroBatch, *, terms: int) -> Tensor:
        """Add the gradient of a micro-batch and return its summed loss and figures, (1 + F,), detached.

        All processes call this together, ceil(M / W) times a step of M micro-batches. The tokens of one that is padding
        do not count in the experts' load: it adds exactly nothing to the gradient and only fills up an uneven share.
        Where a group has the same rows, the sums are this process's share of them.

        Args:
            terms: what the step's loss is divided by, over all its micro-batches.
        """
        if self._is_micro_batch_open:
            self._engine.step()
        with uncounted(self.decoder) if batch.index is None else contextlib.nullcontext():
            sums: Tensor = self._engine(*batch.inputs)
        # DeepSpeed averages gradients over processes; with this factor the result is the gradient of the step's mean
        # loss, whatever the number of processes and micro-batches.
        self._engine.backward(sums[0] * (self.mesh.num_copies / terms), scale_wrt_gas=False)
        self._is_micro_batch_open = True
        return self._share(sums.detach())

    def step(self, lr_factor: float) -> StepResult:
        """Update the weights from the gradients of the step's micro-batches, at `lr_factor` times the peak rates."""
        assert self._engine.is_gradient_accumulation_boundary(), "a step has as many micro-batches as its grid gives it"
        optimizer = self._engine.optimizer
        for group, peak in zip(optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * lr_factor
        norm = self._plain_grad_norm() if self._has_plain_fp32_optimizer else None
        if norm is not None and not norm.isfinite():  # torch's optimizer would write it into the weights
            self.skip_step()
            return StepResult(norm=Arrival(norm), is_skipped=True, loss_scale=1.0)
        if norm is not None and self._clipping:
            torch.nn.utils.clip_grads_with_norm_(self.decoder.parameters(), self._clipping, norm)
        loss_scale = float(optimizer.loss_scale) if self._is_fp16 else 1.0
        self._engine.step()
        self._is_micro_batch_open = False
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return StepResult(
            norm=Arrival(torch.as_tensor(norm)),
            is_skipped=bool(getattr(optimizer, "overflow", False)),
            loss_scale=loss_scale,
        )

    def skip_step(self) -> None:
        """Drop the gradients of the step's micro-batches and leave all else as it was before the first of them.

        All processes call this together, after as many micro-batches. The experts' load is the caller's to reset.
        """
        self._state.drop_gradients()
        if self._is_micro_batch_open:
            per_step = self._engine.gradient_accumulation_steps()
            self._engine.micro_steps += per_step - self._engine.micro_steps % per_step
        self._is_micro_batch_open = False

    def _plain_grad_norm(self) -> Tensor:
        """Return the norm of the averaged gradients, which torch's optimizer without ZeRO does not keep."""
        found = {name: p.grad for name, p in self.decoder.named_parameters() if p.grad is not None}
        device = next(self.decoder.parameters()).device
        squares = sum_of_squares([grad for name, grad in found.items() if name not in self._cuts], device)
        if self._cuts:
            of_cuts = sum_of_squares([grad for name, grad in found.items() if name in self._cuts], device)
            torch.distributed.all_reduce(of_cuts, group=self.mesh.group)
            squares = squares + of_cuts
        return squares.sqrt().float()

    @torch.no_grad()
    def loss(self, batch: MicroBatch) -> Tensor:
        """Return the summed loss of rows that are not trained on, a scalar; all processes call this together.

        Where a group has the same rows, it is this process's share of it.
        """
        self._engine.eval()
        sums: Tensor = self._engine(*batch.inputs)
        self._engine.train()
        return self._share(sums[0])

    def _share(self, sums: Tensor) -> Tensor:
        """Return this process's part of sums that its whole group has computed, or its own."""
        return sums / self.mesh.size if self.mesh.axis == "tensor" else sums

    def state(self) -> EngineState:
        """Return views of what this process holds of the state after a step.

        Micro-batches of the next step change nothing of it, but for Muon's momentum in ZeRO 3.
        """
        facts: dict[str, JsonValue] = {"optimizer_steps": self._state.optimizer_steps()}
        if self._is_fp16:
            facts["loss_scale"] = scaler_fields(self._engine.optimizer.loss_scaler)
        return EngineState(pieces=self._state.pieces(), facts=facts)

    def needs(self) -> list[Stretch]:
        """Return all that `load_state` may read on this process."""
        return list(self._state.needs())

    def load_state(self, reader: StateReader) -> None:
        """Go on from a state of any number of processes and any ZeRO stage; all processes call this together.

        Rates and decay are not in a state: they come from the settings.

        Raises:
            ArtifactError: the state is not whole.
        """
        assert not self._is_micro_batch_open, "a state is loaded only between steps"
        optimizer_steps = reader.facts["optimizer_steps"]
        assert isinstance(optimizer_steps, int), optimizer_steps
        self._state.load(reader, optimizer_steps=optimizer_steps)
        if self._is_fp16:
            fields = reader.facts["loss_scale"]
            assert isinstance(fields, dict), fields
            restore_scaler(self._engine.optimizer.loss_scaler, fields)

    def full_state(self) -> dict[str, Tensor]:
        """Return all weights and buffers on the CPU, in the type trained in; whole on rank 0, empty elsewhere.

        All processes call this together: ZeRO-3 gathers one parameter after the other.
        """
        self._state.settle()
        is_first = torch.distributed.get_rank() == 0
        state: dict[str, Tensor] = {}
        for name, parameter in self.decoder.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                value = parameter.detach()
                if name in self._cuts:
                    value = joined(value, self._cuts[name], self.mesh)
                if is_first:
                    state[name] = value.cpu().clone()
        persistent = self.decoder.state_dict().keys()
        if is_first:
            buffers = self.decoder.named_buffers()
            state.update({name: buffer.cpu().clone() for name, buffer in buffers if name in persistent})
        return state
