"""Settings of the train stage."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

import pydantic
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.objective import Lora, NextToken, Objective
from ray_ds.config.optimizer import AdamW, Optimizer, Schedule
from ray_ds.config.parallel import Offload, Parallel
from ray_ds.config.settings import OUTPUT_UNCHANGED, OutputUnchangedUnless, fill_or_refuse, settings
from ray_ds.config.train_checks import check_parallel, check_together
from ray_ds.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

ROUTER_BIAS_SPEED = 1e-3
BALANCE_WEIGHT = 1e-4
BALANCE_WEIGHT_ALONE = 1e-3
PREDICTION_WEIGHT = 0.3
VALIDATION_TOKENS = 65536
GROW_PAUSE_S = 30.0
MAX_BAD_STEPS = 10
SHARD_CACHE_BYTES = 64 << 30


@settings
class TrainSettings:
    """How a model is trained on token shards.

    A step's batch is a fixed grid of micro-batches that the workers share out, so the number of workers, their threads
    and compilation change the order of sums, hence rounding, and nothing else.
    """

    model: ModelSettings | None = None
    """What is trained; absent where the step's `init_from` names a checkpoint, whose model it is then."""
    objective: Objective = field(default_factory=lambda: NextToken(kind="next_token"))
    """`kind = "next_token"` (also supervised fine-tuning on chat shards), `"dpo"` or `"distill"`, with its settings."""
    lora: Lora | None = None
    """Train low-rank adapters and leave the weights as they are; absent = all weights are trained."""
    seq_len: PositiveInt
    """Tokens in a row; a new model is made for this length."""
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
    fp8: bool = False
    """Whether the layers' products are in FP8, with bf16 only: faster on GPUs from compute capability 8.9 on (Hopper,
    Ada). Routed experts join on Hopper where they are wide enough to gain, from about 1,200 x 1,200 or 2,048 x 816 on.
    Embedding, output projection, router, norms and attention stay in bf16."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over workers: 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: Annotated[Offload, OUTPUT_UNCHANGED] = "none"
    """What lies in host memory instead of the device's: `optimizer` = masters and running means, which AdamW updates
    there, on the CPU; `all` = also the weights, fetched a layer at a time. Slower; for what does not fit otherwise."""
    parallel: Annotated[Parallel, OUTPUT_UNCHANGED] = field(default_factory=Parallel)
    """What a group of processes divides: `tensor`, `expert` or `sequence`; by default every process is its own."""
    optimizer: Optimizer = field(default_factory=lambda: AdamW(kind="adamw"))
    """`kind = "adamw"` or `"muon"`, with its rates."""
    schedule: Schedule = field(default_factory=Schedule)
    """How the rates change over the steps."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all weights; 0 = not clipped."""
    router_bias_speed: NonNegativeFloat | None = None
    """How much an expert's bias moves a step towards balance (arXiv 2408.15664), for a model with experts only; absent
    = 0.001, and 0 with `lora`, where the router stays as it is."""
    balance_weight: NonNegativeFloat | None = None
    """Weight of the loss that keeps each row's experts balanced (arXiv 2412.19437, equation 17), for a model with
    experts only; absent = 0.0001, as DeepSeek-V3, or 0.001, as V2, where its routers have no bias to move."""
    prediction_weight: PositiveFloat | None = None
    """Weight of the loss of multi-token prediction, for a model with such modules only; absent = 0.3, DeepSeek-V3's for
    the first two thirds of its tokens."""
    document_mask: bool = False
    """Whether a document in a row sees itself alone, its positions counted from its BOS. Off as in DeepSeek-V3
    (arXiv 2412.19437, section 4.1): in pretraining it changes little (arXiv 2407.21783, section 3.2) and costs the
    fastest attention kernels. Turn it on for long rows of unrelated short texts."""
    bad_loss: Literal["fail", "skip", "roll_back"] = "fail"
    """What a bad step does: end the job; leave the weights as they were and go on; or go back to the last regular
    checkpoint and on with the data behind the bad step. A loss that is no number is bad, and so is one above
    `loss_spike`."""
    loss_spike: Annotated[float, pydantic.Field(gt=1)] | None = None
    """How many times the median of the last 32 losses a loss must be to count as a spike; absent = never."""
    max_bad_steps: NonNegativeInt | None = None
    """Bad steps that are skipped or rolled back before the job fails, where `bad_loss` is not `fail`; absent = 10."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)] = 0
    """Of the weights at the start and of the order of the rows, below 2 ** 63."""
    window_shards: PositiveInt = 4
    """Shards whose rows are mixed: as many as a node should have at hand at a time."""
    shard_cache_bytes: Annotated[PositiveInt, OUTPUT_UNCHANGED] = SHARD_CACHE_BYTES
    """Bytes that shards from an object store may take on a node's disk, of all runs together; at least two windows."""
    checkpoint_every: Annotated[
        PositiveInt, OutputUnchangedUnless("bad_loss", "roll_back"), OutputUnchangedUnless("keep_best", True)
    ] = 500
    """Steps between regular checkpoints of all state; more are written when the workers are told to stop. It says where
    a roll back goes to, and which models `keep_best` chooses from, so that another number makes another artefact then.
    """
    keep_checkpoints: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 2
    """Checkpoints kept; the older ones are deleted. Two survive one that is damaged."""
    keep_best: Annotated[bool, OutputUnchangedUnless("keep_best", True)] = False
    """Whether the artefact is the model with the lowest validation loss, of those that regular checkpoints and the last
    step have, and not the last step's; that checkpoint is kept beside the newest while training goes on."""
    snapshot_every: Annotated[NonNegativeInt | Literal["auto"], OUTPUT_UNCHANGED] = "auto"
    """Steps between snapshots in the memory of two nodes each; 0 = none; `auto` = as often as costs at most 2 % of the
    time, and every 30 s if that costs more."""
    validate_every: Annotated[NonNegativeInt, OUTPUT_UNCHANGED] = 0
    """Steps between looks at the validation loss; 0 = never."""
    validation_tokens: Annotated[PositiveInt | None, OutputUnchangedUnless("keep_best", True)] = None
    """Tokens of the validation split that such a look reads, rounded up to the workers' micro-batches; absent = 65536.
    """
    log_every: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 10
    """Steps between progress lines; the metrics file has every step."""
    recompute_activations: Annotated[bool, OUTPUT_UNCHANGED] = False
    """Whether layers run a second time in the backward pass: far less memory for about a third more work."""
    kernels: Annotated[Kernels, OUTPUT_UNCHANGED] = "auto"
    """How the model computes: `plain` = obvious steps, to compare with; `fast` = fused kernels that never wait for the
    device; `auto` = what is faster on the device. The differences are of rounding."""
    compile: Annotated[bool, OUTPUT_UNCHANGED] = False
    """Whether torch.compile makes the model's kernels: slow to start, faster on a GPU."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OUTPUT_UNCHANGED] = "auto"
    """What workers compute on; auto = cuda where the cluster has GPUs."""
    num_workers: Annotated[int | tuple[int, int], OUTPUT_UNCHANGED] = 1
    """Processes, a number or `[min, max]` for as many as the cluster holds at the time; on cuda each has one GPU."""
    allowed_workers: Annotated[tuple[PositiveInt, ...] | None, OUTPUT_UNCHANGED] = None
    """Numbers of processes that may train, within `[min, max]` and with graceful scaling; absent = all of them."""
    scaling: Annotated[Literal["graceful", "stock"], OUTPUT_UNCHANGED] = "graceful"
    """Who decides where workers start, when their number changes and how often lost ones are replaced: `graceful`
    makes the state safe first and avoids dead and draining nodes; `stock` is Ray Train's own policy, for a version of
    Ray that `graceful` does not know yet."""
    grow_pause_s: Annotated[NonNegativeFloat | None, OUTPUT_UNCHANGED] = None
    """Least time between a (re)start and the next growth, for `[min, max]` and graceful scaling only, so that nodes
    that come and go do not make training restart all the time; absent = 30."""
    cpus_per_worker: Annotated[PositiveFloat, OUTPUT_UNCHANGED] = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[PositiveInt, OUTPUT_UNCHANGED] = 1
    """Threads a worker computes with on the CPU."""
    max_failures: Annotated[NonNegativeInt, OUTPUT_UNCHANGED] = 3
    """Times that lost workers are replaced without a step done in between, before the job fails: it makes no difference
    whether they failed, did not start or a cloud took their node back. With stock scaling workers that failed count
    over the whole job, and the others not at all."""
    hang_timeout_s: Annotated[PositiveFloat, OUTPUT_UNCHANGED] = 600.0
    """Time within a step without progress after which a worker counts as hung: all stack traces are kept and the
    workers replaced. Half an hour, if that is more, in all else that may take long: the start and the first step after
    each, which may compile; validation; keeping the state; writing the model."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt] | None, OUTPUT_UNCHANGED] = None
    """First and last step of which torch's profiler writes a trace, `profile/` in the artefact; absent = none."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], OUTPUT_UNCHANGED] = ()
    """Where the figures of each step also go; the packages must be installed where the workers run."""

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together or have no effect."""
        if self.model is not None:
            self._fill_for_model(self.model.resolve(vocab_size=1, max_position_embeddings=1))
        unused = None if self.validate_every else "has no effect while validate_every is 0"
        fill_or_refuse(self, "validation_tokens", VALIDATION_TOKENS, unused=unused)
        fill_or_refuse(self, "grow_pause_s", GROW_PAUSE_S, unused=self._why_it_never_grows())
        unused = "has no effect where bad_loss is fail" if self.bad_loss == "fail" else None
        fill_or_refuse(self, "max_bad_steps", MAX_BAD_STEPS, unused=unused)
        check_together(self)

    def _why_it_never_grows(self) -> str | None:
        """Return why what concerns growing has no effect; None where it has one."""
        if not self.is_elastic:
            return "has no effect with a fixed number of workers"
        return "has no effect with stock scaling, which grows as Ray Train does" if self.scaling == "stock" else None

    def _fill_for_model(self, config: ModelConfig) -> None:
        """Give what concerns experts and multi-token prediction its default, or refuse it where it has no effect."""
        dense = None if config.num_moe_layers else "has no effect in a dense model"
        biased = None if config.has_router_bias else "has no effect where routers have no bias (topk_method noaux_tc)"
        speed = ROUTER_BIAS_SPEED if self.lora is None else 0.0
        fill_or_refuse(self, "router_bias_speed", speed, unused=dense or biased)
        is_plain = self.objective.kind == "next_token" and self.lora is None
        other = None if is_plain else "has no effect with lora and with objectives other than next_token"
        weight = BALANCE_WEIGHT if config.has_router_bias else BALANCE_WEIGHT_ALONE
        fill_or_refuse(self, "balance_weight", weight, unused=dense or other)
        if self.lora is not None and self.lora.routed_experts and dense:
            raise ConfigError("lora.routed_experts", True, dense, "remove it")
        unused = None if config.num_nextn_predict_layers else "has no effect while num_nextn_predict_layers is 0"
        fill_or_refuse(self, "prediction_weight", PREDICTION_WEIGHT, unused=unused or other)
        check_parallel(self, config)

    def new_model(self, vocab_size: int) -> ModelConfig:
        """Return the model that is made anew, for rows of `seq_len`; for settings whose step starts from none."""
        assert self.model is not None, "check_named wants a model where there is no init_from"
        return self.model.resolve(vocab_size, self.seq_len)

    def for_model(self, config: ModelConfig) -> "TrainSettings":
        """Return the settings for a model that comes from a checkpoint, what depends on it filled in.

        Raises:
            ConfigError: a setting has no effect on this model.
        """
        copy = dataclasses.replace(self)
        copy._fill_for_model(config)
        return copy

    def check_named(self, names: frozenset[str], *, where: str) -> None:
        """Refuse a model from two places or none, and a start, a teacher or a reference that is missing or of no use.

        Args:
            names: the inputs that the step names by keys of their own, `init_from`, `teacher` and `reference`.
        """
        has_start, has_teacher = "init_from" in names, "teacher" in names
        if has_start and self.model is not None:
            allowed = "must not be given beside init_from, whose checkpoint says what the model is"
            raise ConfigError(f"{where}.model", self.model.preset, allowed, "remove one of them")
        if not has_start and self.model is None:
            raise ConfigError(f"{where}.model", "missing", "must be given, or else init_from", "add one to the step")
        action = 'add init_from = "STEP" beside stage'
        if not has_start and self.objective.kind == "dpo":
            raise ConfigError(f"{where}.objective.kind", "dpo", "needs a checkpoint to start from", action)
        if not has_start and self.lora is not None:
            raise ConfigError(f"{where}.lora.rank", self.lora.rank, "needs a checkpoint to start from", action)
        if has_teacher != (self.objective.kind == "distill"):
            value = "given" if has_teacher else "missing"
            allowed = 'must be named with objective.kind = "distill", and only then'
            raise ConfigError(f"{where}.teacher", value, allowed, "add or remove it, beside stage")
        if "reference" in names and self.objective.kind != "dpo":
            allowed = 'has no effect unless objective.kind = "dpo"'
            raise ConfigError(f"{where}.reference", "given", allowed, "remove it")

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def min_workers(self) -> int:
        """The least workers that train."""
        return self.worker_range[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.worker_range[1]

    @property
    def worker_sizes(self) -> tuple[int, ...] | None:
        """Numbers of processes that may train: whole groups; None = all from the least to the most."""
        if self.allowed_workers is not None or self.parallel.group_size == 1:
            return self.allowed_workers
        return tuple(range(self.min_workers, self.max_workers + 1, self.parallel.group_size))

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while training runs."""
        return isinstance(self.num_workers, tuple)

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
