"""What DeepSpeed keeps of weights, gradients and optimizer state in a worker's memory, and what it takes for a while.

Read from DeepSpeed 0.19.8 as `train.zero.config` sets it up, and held to counted tensors of real engines in
tests/plan/test_states.py. The textbook's 16 bytes a parameter are not it: a step of ZeRO 1 takes 22 with one worker.
"""

from dataclasses import dataclass

from ray_ds.plan.case import Case
from ray_ds.plan.matrices import largest_tensor, layer_matrices

BUCKET_NUMEL = 500_000_000
"""Gradients sent at once: DeepSpeed's `reduce_bucket_size` (zero/config.py), always a buffer of that size."""
ALLREDUCE_NUMEL = 500_000_000
"""The same without ZeRO: `MEMORY_OPT_ALLREDUCE_SIZE` (engine.py)."""
LIVE_NUMEL = 1_000_000_000
"""Weights that ZeRO 3 keeps gathered, `stage3_max_live_parameters`, and those updated at once, `sub_group_size`."""
PREFETCH_NUMEL = 50_000_000
"""Weights that ZeRO 3 gathers ahead, `stage3_prefetch_bucket_size`."""
MASTER_BYTES = 4
MEANS_BYTES = 8
"""Of AdamW's two running means, fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Bytes on a worker's device, those of `host` excepted."""

    weights: int
    masters: int
    optimizer: int
    buffers: int
    """Gradients' place and the bucket, where they are kept between steps."""
    gathered: int
    """Weights of others that ZeRO 3 holds while the model runs."""
    earlier_gradients: int
    """What the micro-batches before have left while a later one runs."""
    bucket: int
    """Comes with the first gradient of a backward pass, unless it is kept anyway."""
    reducing: int
    """Gradients at the end of a step's last backward pass, on top of what is kept, with what sends them."""
    updating: int
    """Gradients and their copies while the optimizer runs, on top of what is kept."""
    starting: int
    """The most while the engine is made, all in all: every worker begins with its whole part of the model in fp32."""
    host: int
    """Bytes in the host's memory for this worker."""

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.optimizer + self.buffers


def states_of(case: Case) -> States:
    """Return what a case's worker with the most keeps and takes."""
    if case.zero_stage == 0:
        return _replicated(case)
    return _partitioned_weights(case) if case.zero_stage == 3 else _partitioned_states(case)


def _replicated(case: Case) -> States:
    """ZeRO 0: everything whole; in 16 bits masters beside the weights, and an fp32 copy of each gradient in a step."""
    count, size, is_mixed = case.num_held_parameters, case.dtype_bytes, case.precision != "fp32"
    masters = MASTER_BYTES * count if is_mixed else 0
    optimizer = _optimizer_bytes(case, momentum_bytes=4)
    gradients = size * count
    updating = gradients + (4 * count if is_mixed else 0)
    kept = gradients + masters + optimizer  # weights are as large as gradients
    return States(
        weights=size * count,
        masters=masters,
        optimizer=optimizer,
        buffers=0,
        gathered=0,
        earlier_gradients=gradients if case.micro_batches > 1 else 0,
        bucket=0,
        reducing=gradients + size * min(count, ALLREDUCE_NUMEL),
        updating=updating + int(4 * _muon_fraction(case) * count),  # Muon's updates in fp32
        # In 16 bits DeepSpeed makes a step without gradients at its start to see the optimizer's states.
        starting=kept + updating if is_mixed else 4 * count,
        host=0,
    )


def _partitioned_states(case: Case) -> States:
    """ZeRO 1 and 2: masters and optimizer state of an even slice; 2 also drops the other slices' gradients."""
    count, size, world_size = case.num_held_parameters, case.dtype_bytes, case.num_copies
    share = -(-count // world_size)
    # Gradients of the parameters that a slice has a part of are kept whole, so those at its ends count fully.
    touched = min(count, share + (largest_tensor(case) if world_size > 1 else 0))
    bucket = size * BUCKET_NUMEL
    sent_copy = size * min(count, BUCKET_NUMEL) if world_size > 1 else 0
    muon = _muon_fraction(case)
    # Muon's mean is held twice, one of them for a step that may yet be dropped.
    optimizer = int(share * ((1 - muon) * MEANS_BYTES + muon * 2 * size))
    masters = MASTER_BYTES * share
    earlier = 0
    if case.micro_batches > 1:
        earlier = size * count + bucket if case.zero_stage == 1 else size * touched
    gradients = size * touched + int(size * muon * share)  # Muon's updates are new tensors beside the gradients
    largest_group = max(muon, 1 - muon)
    copies = (size if case.precision == "fp32" else size + 4) * int(share * largest_group)
    reducing = bucket + gradients + sent_copy
    if case.zero_stage == 1:
        reducing += size * max(0, count - BUCKET_NUMEL)
    else:
        reducing += earlier
    updating = gradients + copies
    host = 0
    if case.offload != "none":
        host = masters + optimizer + (4 + size) * share  # fp32 gradients, and weights on their way back
        if case.zero_stage == 2 and case.micro_batches > 1:
            host += size * touched  # gradients of earlier micro-batches
        masters = optimizer = updating = 0
        earlier = size * count if case.zero_stage == 1 and case.micro_batches > 1 else 0
        reducing = bucket + size * largest_tensor(case) + (size * count if case.zero_stage == 1 else 0)
    return States(
        weights=size * count,
        masters=masters,
        optimizer=optimizer,
        buffers=size * largest_tensor(case) if case.offload != "none" else 0,
        gathered=0,
        earlier_gradients=earlier,
        bucket=bucket,
        reducing=reducing,
        updating=updating,
        starting=max(_whole_model_in_fp32(case), size * count + (2 * MASTER_BYTES * share if masters else 0)),
        host=host,
    )


def _partitioned_weights(case: Case) -> States:
    """ZeRO 3: a slice of everything, place for gradients and the bucket always there, whole weights while they work."""
    count, size, world_size = case.num_held_parameters, case.dtype_bytes, case.num_copies
    share = -(-count // world_size)
    muon = _muon_fraction(case)
    masters = MASTER_BYTES * share
    optimizer = int(share * ((1 - muon) * MEANS_BYTES + muon * size))
    gradients, bucket = size * share, size * BUCKET_NUMEL
    gathered = 0
    if world_size > 1 or case.offload == "all":
        fetched = min(count, PREFETCH_NUMEL + largest_tensor(case))
        gathered = size * (min(count, LIVE_NUMEL) + fetched)
    # Muon orthogonalizes whole gradients, which its workers put together.
    updating = 4 * min(int(share * max(muon, 1 - muon)), LIVE_NUMEL) + size * min(int(muon * count), LIVE_NUMEL)
    starting = size * share + masters + 4 * share + int(size * muon * share)
    host = 0
    weights = size * share
    if case.offload != "none":
        host = masters + optimizer + 4 * share + gradients
        masters = optimizer = updating = gradients = starting = 0
    if case.offload == "all":
        host, weights = host + weights, 0
    return States(
        weights=weights,
        masters=masters,
        optimizer=optimizer,
        buffers=gradients + bucket,
        gathered=gathered,
        earlier_gradients=0,
        bucket=0,
        reducing=gathered + (size * min(count, BUCKET_NUMEL) if world_size > 1 else 0),
        updating=updating,
        starting=max(_whole_model_in_fp32(case), starting),
        host=host,
    )


def _optimizer_bytes(case: Case, momentum_bytes: int) -> int:
    """Return what the optimizer keeps of all parameters."""
    muon = _muon_fraction(case)
    return int(case.num_held_parameters * ((1 - muon) * MEANS_BYTES + muon * momentum_bytes))


def _muon_fraction(case: Case) -> float:
    """Return the part of the parameters that Muon trains: the layers' matrices but for the routers."""
    if not case.uses_muon:
        return 0.0
    routers = case.config.n_routed_experts * case.config.hidden_size * case.config.num_moe_layers
    matrices = sum(matrix.numel * matrix.stored for matrix in layer_matrices(case.config))
    return (matrices - routers) / case.num_parameters  # whole: Muon is refused where weights are divided


def _whole_model_in_fp32(case: Case) -> int:
    """Return the most while the model is brought to its device in fp32 and cast there tensor by tensor."""
    return 4 * case.num_held_parameters + case.dtype_bytes * largest_tensor(case)
