"""Whether a case fits a device, and what takes the place."""

from collections.abc import Mapping
from dataclasses import dataclass

from ray_ds.plan.activations import Activations, activations_of
from ray_ds.plan.case import Case
from ray_ds.plan.states import States, states_of

CONTEXT_BYTES = 3 << 29
"""Assumed outside torch's own count: CUDA's context and kernels, cuBLAS's workspace and NCCL's buffers, 1.5 GiB."""
FRAGMENTATION = 0.05
"""Assumed of torch's allocator: so much of the peak lies in holes that nothing fits into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """A worker's device memory, in bytes."""

    states: States
    activations: Activations
    moments: Mapping[str, int]
    """The most that tensors take, by what the worker does at the time."""

    @property
    def peak_moment(self) -> str:
        """What the worker does when it takes most."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        """The most that tensors take: what `torch.cuda.max_memory_allocated` shows, and a run's `memory_bytes`."""
        return self.moments[self.peak_moment]

    @property
    def needed(self) -> int:
        """What the device must have: the peak, holes between tensors and what lies outside torch's count."""
        return int(self.peak * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def memory_of(case: Case) -> Memory:
    """Return what a case takes."""
    states, activations = states_of(case), activations_of(case)
    running = states.kept + states.gathered + states.earlier_gradients
    # The bucket comes with the head's gradient, when the loss's own gradient has just been used.
    first_gradient = 0 if _has_bucket(case) else states.bucket
    behind_loss = activations.kept + max(activations.loss, activations.again)
    return Memory(
        states=states,
        activations=activations,
        moments={
            "starting": states.starting,
            "running the model": max(running + activations.peak, running + first_gradient + behind_loss),
            "reducing gradients": states.kept + states.reducing,
            "updating weights": states.kept + states.updating,
        },
    )


def _has_bucket(case: Case) -> bool:
    """Tell whether the bucket is there already when a backward pass begins: ZeRO 1 keeps it through a step."""
    return case.zero_stage == 1 and case.micro_batches > 1 and case.offload == "none"
