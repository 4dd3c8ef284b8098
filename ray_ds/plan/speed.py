"""How long a step takes: products, attention, everything elementwise, DeepSpeed's own work, and sending.

Each part is its amount over what the device reaches of its data sheet. The fractions reached were fitted to what one
H200 did (`MEASURED` in tests/plan/test_speed.py lists these runs) and are taken to hold for other kinds.
"""

from dataclasses import dataclass

from ray_ds.plan.activations import layer_bytes
from ray_ds.plan.case import Case
from ray_ds.plan.devices import Fleet
from ray_ds.plan.matrices import layer_matrices, num_heads_used, num_tensors
from ray_ds.plan.traffic import HOST_LINK_BYTES_PER_S, host_bytes, sending_s

PRODUCT_FRACTION = 0.785
"""Of the peak that large bf16 products reach: 776 of 989.4 TFLOP/s, measured on one H200."""
HALF_SPEED_WIDTH = 264
"""A product whose narrowest side is so wide reaches half of that; fitted."""
ATTENTION_FRACTION = 0.40
"""Of the peak that fused causal attention reaches, forward and backward; fitted."""
ATTENTION_AGAIN = 7 / 6
"""Attention's backward pass computes the scores a second time: 7 products where the count of FLOPs has 6."""
COPY_FRACTION = 0.79
"""Of the memory's bandwidth that a copy reaches: 3.8 of 4.8 TB/s, measured on one H200."""
EAGER_PASSES, COMPILED_PASSES = 9.0, 3.0
"""Times that what a layer keeps for the backward pass goes through memory elementwise; fitted."""
EAGER_LOSS_PASSES, COMPILED_LOSS_PASSES = 25.0, 7.0
"""The same of the logits, counted in the loss's fp32 and 16-bit reads and writes."""
TENSOR_S = 120e-6
"""DeepSpeed's work in Python for each parameter in a step of ZeRO 1 or 2; fitted."""
GATHER_S = 500e-6
"""ZeRO 3's work in Python for each parameter in a micro-batch, gathering and letting go, both ways; fitted."""
EAGER_LAUNCH_S, COMPILED_LAUNCH_S = 1.5e-3, 0.4e-3
"""A layer's time in a micro-batch to start its kernels, both ways: no work of the device is shorter; assumed."""
MICRO_BATCH_LAYER_S = 1e-4
"""What a layer loses in each micro-batch at the ends of its kernels; fitted to batches of 8 to 32 rows."""
STEP_BYTES = 58
"""What a step reads and writes for each parameter that a worker updates: bucket, norm, fp32 copy, clipping, AdamW."""
HOST_UPDATES_PER_S = 1e9
"""Assumed parameters that a host updates a second for each GPU with offload (DeepSpeed's CPUAdam)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Seconds of a step."""

    products: float
    attention: float
    elementwise: float
    starting: float
    """Of kernels: their ends, and waiting for them where micro-batches are small."""
    update: float
    """The optimizer and DeepSpeed's work around it, and ZeRO 3's gathering in Python."""
    sending: float
    tokens_per_s: float
    """Of all workers."""

    @property
    def step_s(self) -> float:
        """The whole step: nothing overlaps, as `overlap_comm` is off."""
        return self.products + self.attention + self.elementwise + self.starting + self.update + self.sending


def speed_of(case: Case, fleet: Fleet) -> Speed:
    """Return how fast a case trains."""
    tokens = case.micro_tokens * case.micro_batches
    runs = 4 / 3 if case.recompute else 1.0
    products = runs * tokens * _product_s(case, fleet)
    attention = runs * tokens * _attention_s(case, fleet)
    elementwise = tokens * _elementwise_s(case, fleet, runs)
    parts = {
        "products": products,
        "attention": attention,
        "elementwise": elementwise,
        "starting": _starting_s(case, products + attention + elementwise),
        "update": _update_s(case, fleet),
        "sending": sending_s(case, fleet),
    }
    return Speed(**parts, tokens_per_s=case.batch_tokens / sum(parts.values()))


def _starting_s(case: Case, working_s: float) -> float:
    """Return a step's seconds that the device spends on the model beyond the work of its kernels."""
    layers = (case.config.num_hidden_layers + case.config.num_nextn_predict_layers) * case.micro_batches
    launching = layers * (COMPILED_LAUNCH_S if case.compile else EAGER_LAUNCH_S)
    return layers * MICRO_BATCH_LAYER_S + max(0.0, launching - working_s)


def _peak_flops(case: Case, fleet: Fleet) -> float:
    """Return the device's peak in the case's type."""
    return fleet.kind.fp32_flops if case.precision == "fp32" else fleet.kind.peak_flops


def _product_s(case: Case, fleet: Fleet) -> float:
    """Return a token's seconds in matrix products, forward and backward."""
    config = case.part
    weighed = 0.0
    for matrix in layer_matrices(config):
        weighed += matrix.used * matrix.numel / _width_fraction(min(matrix.rows, matrix.columns))
    head = num_heads_used(config) * config.vocab_size * config.hidden_size
    weighed += head / _width_fraction(config.hidden_size)
    return 6 * weighed / (_peak_flops(case, fleet) * PRODUCT_FRACTION)


def _width_fraction(width: int) -> float:
    return width / (width + HALF_SPEED_WIDTH)


def _attention_s(case: Case, fleet: Fleet) -> float:
    """Return a token's seconds in scores and weighted values."""
    config = case.part
    width = 2 * max(config.qk_head_dim, config.value_head_dim)  # values are padded to the width of keys
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    flops = 3 * layers * config.num_attention_heads * width * case.seq_len
    return ATTENTION_AGAIN * flops / (_peak_flops(case, fleet) * ATTENTION_FRACTION)


def _elementwise_s(case: Case, fleet: Fleet, runs: float) -> float:
    """Return a token's seconds in what is bound by memory: norms, rotations, gates, sums, the loss."""
    config = case.config
    sparse = config.num_moe_layers
    dense = config.num_hidden_layers + config.num_nextn_predict_layers - sparse
    layers = dense * layer_bytes(case, is_sparse=False) + sparse * layer_bytes(case, is_sparse=True)
    logits = num_heads_used(config) * config.vocab_size * case.dtype_bytes
    passes, loss_passes = (COMPILED_PASSES, COMPILED_LOSS_PASSES) if case.compile else (EAGER_PASSES, EAGER_LOSS_PASSES)
    moved = runs * passes * layers + loss_passes * logits
    return moved / (fleet.kind.bandwidth * COPY_FRACTION)


def _update_s(case: Case, fleet: Fleet) -> float:
    """Return a step's seconds outside the model."""
    share = case.num_held_parameters / (case.num_copies if case.zero_stage else 1)
    tensors = num_tensors(case.config)
    seconds = tensors * TENSOR_S
    if case.offload != "none":
        seconds += share / HOST_UPDATES_PER_S + host_bytes(case) / HOST_LINK_BYTES_PER_S
    else:
        seconds += share * STEP_BYTES / (fleet.kind.bandwidth * COPY_FRACTION)
    if case.zero_stage == 3:
        seconds += case.micro_batches * tensors * GATHER_S
    return seconds
