"""DeepSpeed's partitions: what each ZeRO stage keeps where, and how it is told that it changed.

The one file that leans on the private structures of DeepSpeed 0.19.8; tests/train/zero/test_partitions.py holds each
name used here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ray_ds.train.zero.layout import FlatSpan, Layout, Stage, Trained

MOMENTUM_KEY = "momentum_buffer"
"""What DeepSpeed's Muon calls its running mean."""
Names = Mapping[nn.Parameter, str]


def stage_of(engine: Any, names: Names) -> Stage:
    """Return the ways of an engine's stage."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Zero3(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _Zero12(optimizer, names)
    return _Replicated(optimizer, names, engine.data_parallel_group)


class _Replicated:
    """ZeRO 0: every process has everything, and lists its even share of each tensor."""

    def __init__(self, optimizer: Any, names: Names, group: Any) -> None:
        """Undo the step that DeepSpeed makes at its start in bf16, to see the optimizer's states.

        It decays the masters at the peak rate and AdamW counts it, unlike in the other stages.
        Source: DeepSpeed 0.19.8, fp16/unfused_optimizer.py `initialize_optimizer_states`.
        """
        groups = optimizer.param_groups
        is_rounded = isinstance(optimizer, FP16_UnfusedOptimizer)
        if is_rounded:
            optimizer.refresh_fp32_params()
            optimizer.state.clear()
        self._uses_muon = [bool(group.get("use_muon")) for group in groups]
        self._masters: list[list[Tensor]] = [group["params"] for group in groups]
        self._weights: list[list[Any]] = optimizer.fp16_groups if is_rounded else self._masters
        self._names = names
        self._place, self._size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

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
        shape, numel = master.shape, master.numel()
        start, stop = numel * self._place // self._size, numel * (self._place + 1) // self._size
        whole = FlatSpan(name=name, shape=tuple(shape), start=0, stop=numel, offset=0)
        share = FlatSpan(name=name, shape=tuple(shape), start=start, stop=stop, offset=start)
        return Layout(owned=[share] if start < stop else [], held=[whole], shape=shape)

    def open(self) -> None:
        pass

    def refresh(self) -> None:
        for masters, weights in zip(self._masters, self._weights, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)

    def settle(self) -> None:
        pass

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
            spans = self._slice(group)
            layout = Layout(owned=spans, held=spans, shape=master.shape)
            uses_muon = bool(optimizer.optimizer.param_groups[group].get("use_muon"))
            momentum = self._whole_parameters(spans) if uses_muon else None
            found.append(Trained(master=master, layout=layout, momentum=momentum, momentum_dtype=dtype))
        return found

    def _slice(self, group: int) -> list[FlatSpan]:
        """Return what this process's slice of a group holds."""
        optimizer, size = self._optimizer, self._optimizer.partition_size[group]
        first = size * torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        parameters = optimizer.round_robin_bit16_groups[group]
        spans = []
        for parameter, at in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            start, stop = max(first - at, 0), min(first + size - at, parameter.numel())
            if start < stop:
                name, shape = self._names[parameter], tuple(parameter.shape)
                spans.append(FlatSpan(name=name, shape=shape, start=start, stop=stop, offset=at + start - first))
        return spans

    def _whole_parameters(self, spans: Sequence[FlatSpan]) -> Layout:
        """Return the layout of Muon's mean: the whole of each parameter of which the slice has a part.

        A parameter that two processes share is orthogonalized by both, each with a copy of its mean.
        Source: DeepSpeed 0.19.8, stage_1_and_2.py `_muon_momentum_buffer` and `_get_flat_partition_unpadded`.
        """
        owned, held, size = [], [], 0
        for span in spans:
            numel = torch.Size(span.shape).numel()
            held.append(FlatSpan(name=span.name, shape=span.shape, start=0, stop=numel, offset=size))
            offset = size + span.start
            owned.append(FlatSpan(name=span.name, shape=span.shape, start=span.start, stop=span.stop, offset=offset))
            size += numel
        return Layout(owned=owned, held=held, shape=torch.Size([size]))

    def open(self) -> None:
        pass

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def settle(self) -> None:
        pass

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID  # the next gradient replaces what is in host memory
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
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
            spans = self._parts(group)
            layout = Layout(owned=spans, held=spans, shape=master.shape)
            uses_muon = optimizer.use_muon and optimizer.sub_groups_using_muon[group]
            momentum = layout if uses_muon else None
            dtype = optimizer.communication_data_type
            found.append(Trained(master=master, layout=layout, momentum=momentum, momentum_dtype=dtype))
        return found

    def _parts(self, group: int) -> list[FlatSpan]:
        """Return this process's part of each parameter; the last process's is filled up."""
        rank, offset, spans = torch.distributed.get_rank(), 0, []
        for parameter in self._optimizer.fp16_groups[group]:
            size = parameter.partition_numel()
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                name, shape = self._names[parameter], tuple(parameter.ds_shape)
                spans.append(FlatSpan(name=name, shape=shape, start=start, stop=stop, offset=offset))
            offset += size
        return spans

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

    def settle(self) -> None:
        """Release everything but the small parameters.

        A pass that leaves out layers (a look at the loss runs no multi-token prediction) leaves them in flight.
        """
        self._optimizer._partition_all_parameters()
        self._gather_small_parameters()

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients = {}
        self._gather_small_parameters()
