"""Settings of the train stage."""

from dataclasses import field
from typing import Annotated, Literal

import pydantic
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ray_ds.config.model import ModelSettings
from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]

ROUTER_BIAS_SPEED = 1e-3
VALIDATION_TOKENS = 65536


@settings
class AdamW:
    """AdamW (arXiv 1711.05101); norms and biases are not decayed."""

    kind: Literal["adamw"]
    """Selects this optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices, multiplied by the rate."""


@settings
class Muon:
    """Muon (kellerjordan.github.io/posts/muon) on the layers' matrices; AdamW on embeddings, head, router and norms."""

    kind: Literal["muon"]
    """Selects this optimizer."""
    lr: PositiveFloat = 0.02
    """Peak learning rate of matrices; an update has singular values near 1 before it is multiplied."""
    momentum: Fraction = 0.95
    """Decay of the running mean of the gradient (Nesterov)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices and embeddings, multiplied by their rate."""
    adam_lr: PositiveFloat = 3e-3
    """Peak learning rate of what AdamW trains."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of AdamW's two running means."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second mean."""


Optimizer = Annotated[AdamW | Muon, pydantic.Field(discriminator="kind")]


@settings
class Schedule:
    """Linear warm-up, then a cosine down to a fraction of the peak at the last step."""

    warmup_steps: NonNegativeInt = 100
    """Steps over which the rate rises from 0."""
    final_lr_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """The last step's rate, as a fraction of the peak."""


@settings
class TrainSettings:
    """How a model is trained on token shards.

    A step's batch is a fixed grid of micro-batches that the workers share out, so the number of workers, their threads
    and compilation change the order of sums, hence rounding, and nothing else.
    """

    model: ModelSettings
    """What is trained."""
    seq_len: PositiveInt
    """Tokens in a row; the model is made for this length."""
    batch_tokens: PositiveInt
    """Tokens in a step, over all workers."""
    micro_batch: PositiveInt
    """Rows that a worker sends through the model at once."""
    steps: PositiveInt | None = None
    """Optimizer steps; either this or `tokens`."""
    tokens: PositiveInt | None = None
    """Tokens to train on, rounded up to whole steps; either this or `steps`."""
    precision: Precision = "bf16"
    """Type of weights and activations; the optimizer keeps fp32 masters. fp16 scales the loss dynamically."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over workers: 1 optimizer state, 2 also gradients, 3 also weights."""
    optimizer: Optimizer = field(default_factory=lambda: AdamW(kind="adamw"))
    """`kind = "adamw"` or `"muon"`, with its rates."""
    schedule: Schedule = field(default_factory=Schedule)
    """How the rates change over the steps."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all weights; 0 = not clipped."""
    router_bias_speed: NonNegativeFloat | None = None
    """How much an expert's bias moves a step towards balance (arXiv 2408.15664), for a model with experts only; absent
    = 0.001."""
    seed: NonNegativeInt = 0
    """Of the weights at the start and of the order of the rows."""
    window_shards: PositiveInt = 4
    """Shards whose rows are mixed: as many as a node should have at hand at a time."""
    checkpoint_every: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 500
    """Steps between checkpoints of all state."""
    keep_checkpoints: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 2
    """Checkpoints kept; the older ones are deleted. Two survive one that is damaged."""
    validate_every: Annotated[NonNegativeInt, OUTPUT_UNCHANGED] = 0
    """Steps between looks at the validation loss; 0 = never."""
    validation_tokens: Annotated[PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Tokens of the validation split that such a look reads, rounded up to the workers' micro-batches; absent = 65536.
    """
    log_every: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 10
    """Steps between progress lines; the metrics file has every step."""
    recompute_activations: Annotated[bool, OUTPUT_UNCHANGED] = False
    """Whether layers run a second time in the backward pass: far less memory for about a third more work."""
    compile: Annotated[bool, OUTPUT_UNCHANGED] = False
    """Whether torch.compile makes the model's kernels: slow to start, faster on a GPU."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What workers compute on; auto = cuda where the cluster has GPUs."""
    num_workers: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 1
    """Processes; on cuda each has one GPU."""
    cpus_per_worker: Annotated[PositiveFloat, OUTPUT_UNCHANGED] = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads a worker computes with on the CPU."""
    max_failures: Annotated[NonNegativeInt, OUTPUT_UNCHANGED] = 3
    """Times that lost workers are replaced, each time from the last checkpoint, before the job fails."""

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together or have no effect."""
        has_experts = self.model.resolve(vocab_size=1, max_position_embeddings=1).num_moe_layers > 0
        unused = None if has_experts else "has no effect in a dense model"
        fill_or_refuse(self, "router_bias_speed", ROUTER_BIAS_SPEED, unused=unused)
        unused = None if self.validate_every else "has no effect while validate_every is 0"
        fill_or_refuse(self, "validation_tokens", VALIDATION_TOKENS, unused=unused)
        self._check_length()
        self._check_grid()
        self._check_muon()
        self._check_fp16()

    def _check_length(self) -> None:
        """Want exactly one of `steps` and `tokens`, and more steps than the warm-up has."""
        if (self.steps is None) == (self.tokens is None):
            value = "neither" if self.steps is None else f"{self.steps} and {self.tokens}"
            raise ConfigError("steps or tokens", value, "must be given, exactly one of them", "give one")
        if self.schedule.warmup_steps >= self.num_steps:
            allowed = f"must be below the number of steps ({self.num_steps})"
            raise ConfigError("schedule.warmup_steps", self.schedule.warmup_steps, allowed, "lower it")

    def _check_grid(self) -> None:
        """Want a batch of whole micro-batches that the workers can share out evenly."""
        unit = self.micro_batch * self.seq_len
        if self.batch_tokens % unit:
            allowed = f"must be a multiple of micro_batch * seq_len ({self.micro_batch} * {self.seq_len} = {unit})"
            raise ConfigError("batch_tokens", self.batch_tokens, allowed, f"try {_round_up(self.batch_tokens, unit)}")
        if self.num_micro_batches % self.num_workers:
            grid = f"{self.num_workers} * {self.micro_batch} * {self.seq_len} = {self.num_workers * unit}"
            allowed = f"must be a multiple of num_workers * micro_batch * seq_len ({grid})"
            fitting = _round_up(self.batch_tokens, self.num_workers * unit)
            raise ConfigError("batch_tokens", self.batch_tokens, allowed, f"try {fitting}, or another num_workers")

    def _check_muon(self) -> None:
        """Refuse clipping where DeepSpeed would clip Muon's update instead of the gradient.

        Source: DeepSpeed 0.19.8, stage_1_and_2.py `step` and stage3.py `step`: the norm is taken after Muon ran.
        """
        if self.optimizer.kind == "muon" and self.zero_stage >= 1 and self.gradient_clipping > 0:
            allowed = "must be 0 with Muon in ZeRO 1-3, where DeepSpeed clips the orthogonalized update"
            action = "set it to 0 (Muon's update does not grow with the gradient), or set zero_stage to 0"
            raise ConfigError("gradient_clipping", self.gradient_clipping, allowed, action)

    def _check_fp16(self) -> None:
        """Refuse fp16 where its loss would not be scaled.

        Source: DeepSpeed 0.19.8, engine.py `backward` scales for a `ZeROOptimizer` only, while stage 0's
        `FP16_UnfusedOptimizer.step` divides the gradient by the scale all the same.
        """
        if self.precision == "fp16" and self.zero_stage == 0:
            allowed = "must be 1, 2 or 3 with fp16: DeepSpeed does not scale the loss in ZeRO 0"
            raise ConfigError("zero_stage", self.zero_stage, allowed, "use 1, or precision bf16")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.batch_tokens)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, over all workers."""
        return self.batch_tokens // (self.micro_batch * self.seq_len)

    @property
    def batch_rows(self) -> int:
        """Rows of a step, over all workers."""
        return self.batch_tokens // self.seq_len


def _round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit
