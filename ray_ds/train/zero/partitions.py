"""DeepSpeed's state by logical parameter: which elements this process holds, read and written where they lie.

The one file that leans on the private partition structures of DeepSpeed 0.19.8; tests/train/zero/test_partitions.py
holds each name used here. What DeepSpeed itself offers for this was seen to fail: its universal checkpoint gives all
parameter groups the first one's weight decay and all sub-groups one `step` tensor, knows no Muon and no change of
stage; `safe_get_full_optimizer_state` finds nothing in the second group. So hyper-parameters are never read, `step` is
made anew for each tensor, and the weights trained in are refreshed from the masters on all processes.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ray_ds.train.state import Kind, Piece, StateReader

ADAM_KINDS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
MOMENTUM_KEY = "momentum_buffer"
"""What DeepSpeed's Muon calls its running mean."""
Names = Mapping[nn.Parameter, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Neighbouring elements of a parameter, and where they lie in a flat tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    stop: int
    offset: int
    """Where they begin in the flat tensor."""

    def within(self, flat: Tensor) -> Tensor:
        """Return them, a 1-D view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a tensor of this process holds."""

    owned: Sequence[Run]
    """What this process lists; no element is listed by two."""
    held: Sequence[Run]
    """All there is but padding; it overlaps with other processes' where these keep copies."""
    shape: torch.Size
    """Of the tensor itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A tensor that the optimizer updates."""

    master: Tensor
    layout: Layout
    """Of the master and AdamW's means."""
    momentum: Layout | None
    """Of Muon's mean; None where AdamW trains."""
    momentum_dtype: torch.dtype


class Stage(Protocol):
    """A ZeRO stage's ways."""

    def trained(self) -> list[Trained]:
        """Return what this process's optimizer updates."""

    def open(self) -> None:
        """Get ready for masters to be written."""

    def refresh(self) -> None:
        """Round the masters to the weights trained in, on all processes."""

    def drop_gradients(self) -> None:
        """Forget the gradients gathered since the last step, as after an overflow of fp16."""


class Partitions:
    """The state of a DeepSpeed engine as this process holds it."""

    def __init__(self, decoder: nn.Module, engine: Any) -> None:
        """Look at a `DeepSpeedEngine` that was just made, with ZeRO 0 to 3 and nothing offloaded."""
        names = {parameter: name for name, parameter in decoder.named_parameters()}
        self._stage = _stage_of(engine, names)
        self._trained = self._stage.trained()
        self._states: MutableMapping[Tensor, dict[str, Tensor]] = engine.basic_optimizer.state
        # torch's fused AdamW wants its step counts on the device, the plain one on the CPU.
        self._is_fused = any(group.get("fused") for group in engine.basic_optimizer.param_groups)
        persistent = decoder.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in decoder.named_buffers() if name in persistent}

    def pieces(self) -> list[Piece]:
        """Return views of all this process holds alone."""
        return [*self._trained_pieces(), *(self._buffer_pieces() if torch.distributed.get_rank() == 0 else ())]

    def _trained_pieces(self) -> Iterator[Piece]:
        for trained in self._trained:
            state = self._states.get(trained.master, {})
            yield from _cut("master", trained.layout.owned, trained.master)
            for kind in ADAM_KINDS:
                if kind in state:
                    yield from _cut(kind, trained.layout.owned, state[kind])
            if trained.momentum is not None and MOMENTUM_KEY in state:
                yield from _cut("momentum", trained.momentum.owned, state[MOMENTUM_KEY])

    def _buffer_pieces(self) -> Iterator[Piece]:
        for name, buffer in self._buffers.items():
            whole = Run(name=name, shape=tuple(buffer.shape), start=0, stop=buffer.numel(), offset=0)
            yield from _cut("buffer", [whole], buffer)

    def optimizer_steps(self) -> int:
        """Return how many steps changed the weights, by AdamW's own count; every optimizer has it for the norms."""
        counts = {int(state["step"]) for state in self._states.values() if "step" in state}
        assert len(counts) <= 1, f"all parameters step together, and yet: {counts}"
        return counts.pop() if counts else 0

    def forget_trial_step(self) -> None:
        """Undo the step that DeepSpeed makes at its start in bf16 without ZeRO, to see the optimizer's states.

        It decays the masters at the peak rate and AdamW counts it, unlike in the other stages.
        Source: DeepSpeed 0.19.8, fp16/unfused_optimizer.py `initialize_optimizer_states`.
        """
        if isinstance(self._stage, _Replicated):
            self._stage.restore_masters()
            self._states.clear()

    @torch.no_grad()
    def load(self, reader: StateReader, *, optimizer_steps: int) -> None:
        """Take over a whole state; all processes call this together.

        Raises:
            ArtifactError: the state is not whole.
        """
        self._stage.open()
        for trained in self._trained:
            _fill("master", trained.layout.held, trained.master, reader)
            if trained.momentum is None:
                self._load_adam(trained, reader, optimizer_steps)
            else:
                self._load_momentum(trained, trained.momentum, reader, optimizer_steps)
        for name, buffer in self._buffers.items():
            buffer.view(-1).copy_(reader.read(name, "buffer", 0, buffer.numel()))
        self._stage.refresh()

    def _load_adam(self, trained: Trained, reader: StateReader, optimizer_steps: int) -> None:
        """Load AdamW's means, made where there are none yet; before the first step it has none."""
        if not optimizer_steps:
            self._states.pop(trained.master, None)
            return
        state = self._states.setdefault(trained.master, {})
        # One tensor for each: AdamW counts in place, so a shared one would count every tensor's step.
        device = trained.master.device if self._is_fused else torch.device("cpu")
        state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=device)
        for kind in ADAM_KINDS:
            if kind not in state:
                state[kind] = torch.zeros_like(trained.master)
            _fill(kind, trained.layout.held, state[kind], reader)

    def _load_momentum(self, trained: Trained, layout: Layout, reader: StateReader, optimizer_steps: int) -> None:
        """Load Muon's mean; before the first step it may be absent, which DeepSpeed takes for zeros."""
        if not layout.held:
            return
        if not optimizer_steps and not reader.has(layout.held[0].name, "momentum"):
            self._states.pop(trained.master, None)
            return
        state = self._states.setdefault(trained.master, {})
        if MOMENTUM_KEY not in state:
            made = torch.zeros(layout.shape, dtype=trained.momentum_dtype, device=trained.master.device)
            state[MOMENTUM_KEY] = made
        _fill("momentum", layout.held, state[MOMENTUM_KEY], reader)

    def drop_gradients(self) -> None:
        """Forget the gradients gathered since the last step; all processes call this together."""
        self._stage.drop_gradients()


def _cut(kind: Kind, runs: Sequence[Run], flat: Tensor) -> Iterator[Piece]:
    for run in runs:
        yield Piece(name=run.name, kind=kind, shape=run.shape, start=run.start, values=run.within(flat))


def _fill(kind: Kind, runs: Sequence[Run], flat: Tensor, reader: StateReader) -> None:
    for run in runs:
        run.within(flat).copy_(reader.read(run.name, kind, run.start, run.stop))


def _stage_of(engine: Any, names: Names) -> Stage:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Zero3(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _Zero12(optimizer, names)
    return _Replicated(optimizer, names)


class _Replicated:
    """ZeRO 0: every process has everything, and lists its even share of each tensor."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        groups = optimizer.param_groups
        is_rounded = isinstance(optimizer, FP16_UnfusedOptimizer)
        self._optimizer = optimizer
        self._uses_muon = [bool(group.get("use_muon")) for group in groups]
        self._masters: list[list[Tensor]] = [group["params"] for group in groups]
        self._weights: list[list[Any]] = optimizer.fp16_groups if is_rounded else self._masters
        self._names = names

    def trained(self) -> list[Trained]:
        found = []
        for uses_muon, masters, weights in zip(self._uses_muon, self._masters, self._weights, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                layout = self._layout(self._names[weight], master)
                momentum = layout if uses_muon else None
                made = Trained(master=master, layout=layout, momentum=momentum, momentum_dtype=master.dtype)
                found.append(made)
        return found

    def _layout(self, name: str, master: Tensor) -> Layout:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        shape, numel = master.shape, master.numel()
        start, stop = numel * rank // world_size, numel * (rank + 1) // world_size
        whole = Run(name=name, shape=tuple(shape), start=0, stop=numel, offset=0)
        share = Run(name=name, shape=tuple(shape), start=start, stop=stop, offset=start)
        return Layout(owned=[share] if start < stop else [], held=[whole], shape=shape)

    def restore_masters(self) -> None:
        """Take the masters from the weights again."""
        if self._weights is not self._masters:
            self._optimizer.refresh_fp32_params()

    def open(self) -> None:
        pass

    def refresh(self) -> None:
        for masters, weights in zip(self._masters, self._weights, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)

    def drop_gradients(self) -> None:
        for weights in self._weights:
            for weight in weights:
                weight.grad = None


class _Zero12:
    """ZeRO 1 and 2: a group's parameters lie one after the other, and each process has one slice of that."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer = optimizer
        self._names = names

    def trained(self) -> list[Trained]:
        optimizer = self._optimizer
        dtype = optimizer.gradient_accumulation_dtype if optimizer.use_grad_accum_attribute else optimizer.dtype
        found = []
        for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
            runs = self._slice(group)
            layout = Layout(owned=runs, held=runs, shape=master.shape)
            uses_muon = bool(optimizer.optimizer.param_groups[group].get("use_muon"))
            momentum = self._whole_parameters(runs) if uses_muon else None
            found.append(Trained(master=master, layout=layout, momentum=momentum, momentum_dtype=dtype))
        return found

    def _slice(self, group: int) -> list[Run]:
        """Return what this process's slice of a group holds."""
        optimizer, size = self._optimizer, self._optimizer.partition_size[group]
        first = size * torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        parameters = optimizer.round_robin_bit16_groups[group]
        runs = []
        for parameter, at in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            start, stop = max(first - at, 0), min(first + size - at, parameter.numel())
            if start < stop:
                name, shape = self._names[parameter], tuple(parameter.shape)
                runs.append(Run(name=name, shape=shape, start=start, stop=stop, offset=at + start - first))
        return runs

    def _whole_parameters(self, runs: Sequence[Run]) -> Layout:
        """Return the layout of Muon's mean: the whole of each parameter of which the slice has a part.

        A parameter that two processes share is orthogonalized by both, each with a copy of its mean.
        Source: DeepSpeed 0.19.8, stage_1_and_2.py `_muon_momentum_buffer` and `_get_flat_partition_unpadded`.
        """
        owned, held, size = [], [], 0
        for run in runs:
            numel = torch.Size(run.shape).numel()
            held.append(Run(name=run.name, shape=run.shape, start=0, stop=numel, offset=size))
            offset = size + run.start
            owned.append(Run(name=run.name, shape=run.shape, start=run.start, stop=run.stop, offset=offset))
            size += numel
        return Layout(owned=owned, held=held, shape=torch.Size([size]))

    def open(self) -> None:
        pass

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None


class _Zero3:
    """ZeRO 3: each parameter is cut evenly over the processes; a sub-group's parts lie one after the other."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer = optimizer
        self._names = names

    def trained(self) -> list[Trained]:
        optimizer = self._optimizer
        found = []
        for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            runs = self._parts(group)
            layout = Layout(owned=runs, held=runs, shape=master.shape)
            uses_muon = optimizer.use_muon and optimizer.sub_groups_using_muon[group]
            momentum = layout if uses_muon else None
            dtype = optimizer.communication_data_type
            found.append(Trained(master=master, layout=layout, momentum=momentum, momentum_dtype=dtype))
        return found

    def _parts(self, group: int) -> list[Run]:
        """Return this process's part of each parameter; the last process's is filled up."""
        rank, offset, runs = torch.distributed.get_rank(), 0, []
        for parameter in self._optimizer.fp16_groups[group]:
            size = parameter.partition_numel()
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                name, shape = self._names[parameter], tuple(parameter.ds_shape)
                runs.append(Run(name=name, shape=shape, start=start, stop=stop, offset=offset))
            offset += size
        return runs

    def open(self) -> None:
        self._optimizer._partition_all_parameters()

    def refresh(self) -> None:
        for group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_small_parameters()

    def _gather_small_parameters(self) -> None:
        """Make those whole that stay so between steps."""
        small = self._optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients = {}
        self._gather_small_parameters()
