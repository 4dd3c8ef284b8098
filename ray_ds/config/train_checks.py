"""What a train step's settings must be to go together: each check a function, and what it says when it refuses."""

from operator import attrgetter
from typing import TYPE_CHECKING

from ray_ds.config.model import ModelConfig
from ray_ds.config.parallel import AXES, Choice, Parallel, check_sizes, refusal
from ray_ds.errors import ConfigError

if TYPE_CHECKING:
    from ray_ds.config.train import TrainSettings


def check_together(settings: "TrainSettings") -> None:
    """Refuse settings that do not go together, whatever the model is.

    Raises:
        ConfigError: two of them do not.
    """
    _check_best(settings)
    _check_workers(settings)
    _check_length(settings)
    _check_profile(settings)
    _check_grid(settings)
    _check_muon(settings)
    _check_fp8(settings)


def check_parallel(settings: "TrainSettings", config: ModelConfig) -> None:
    """Refuse what does not go together on a model, by the table of `config.parallel`.

    Raises:
        ConfigError: the table refuses it, or groups would have remainders.
    """
    choice = Choice(
        axes=tuple(axis for axis in AXES if getattr(settings.parallel, axis) > 1),
        zero_stage=settings.zero_stage,
        offload=settings.offload,
        precision=settings.precision,
        optimizer=settings.optimizer.kind,
        attention=config.attention,
        has_experts=config.num_moe_layers > 0,
        objective=settings.objective.kind,
        has_adapters=settings.lora is not None,
        is_fp8=settings.fp8,
        is_compiled=settings.compile,
    )
    rule = refusal(choice)
    if rule is not None:
        value = attrgetter(rule.field)(settings)
        shown = list(choice.axes) if isinstance(value, Parallel) else value
        raise ConfigError(rule.field, shown, rule.allowed, rule.action)
    check_sizes(settings.parallel, config, settings.seq_len)


def _check_best(settings: "TrainSettings") -> None:
    """Want a validation loss of every regular checkpoint, where the best of them is looked for."""
    if not settings.keep_best:
        return
    if not settings.validate_every:
        raise ConfigError("keep_best", True, "has no effect while validate_every is 0", "remove it, or validate")
    if settings.checkpoint_every % settings.validate_every:
        allowed = (
            f"must be a multiple of validate_every ({settings.validate_every}) with keep_best, or checkpoints have "
        )
        allowed += "no validation loss to compare"
        action = f"try {_round_up(settings.checkpoint_every, settings.validate_every)}"
        raise ConfigError("checkpoint_every", settings.checkpoint_every, allowed, action)


def _check_workers(settings: "TrainSettings") -> None:
    """Want a range of workers that is one, and sizes that lie in it."""
    given = list(settings.worker_range) if settings.is_elastic else settings.num_workers
    if settings.min_workers < 1:
        allowed = "must be 1 or more, a number or [min, max]"
        raise ConfigError("num_workers", given, allowed, "raise it")
    if settings.min_workers > settings.max_workers:
        raise ConfigError("num_workers", given, "must be [min, max]", "swap them")
    _check_groups(settings)
    if settings.allowed_workers is None:
        return
    if not settings.allowed_workers:
        raise ConfigError("allowed_workers", [], "must name a number of workers", "add one, or remove the setting")
    if not settings.is_elastic:
        value = list(settings.allowed_workers)
        raise ConfigError("allowed_workers", value, "has no effect with a fixed number of workers", "remove it")
    if settings.scaling == "stock":
        allowed = "has no effect with stock scaling: Ray Train takes any number within num_workers"
        raise ConfigError("allowed_workers", list(settings.allowed_workers), allowed, "remove one of them")
    if any(not settings.min_workers <= size <= settings.max_workers for size in settings.allowed_workers):
        allowed = f"must lie within num_workers, {settings.min_workers} to {settings.max_workers}"
        raise ConfigError("allowed_workers", list(settings.allowed_workers), allowed, "correct one of them")


def _check_groups(settings: "TrainSettings") -> None:
    """Want numbers of workers that are whole groups, and a policy that keeps to them."""
    size = settings.parallel.group_size
    for name, sizes in (("num_workers", settings.worker_range), ("allowed_workers", settings.allowed_workers or ())):
        if any(number % size for number in sizes):
            value = getattr(settings, name)
            allowed = f"must be whole groups of {size}, the product of parallel"
            raise ConfigError(name, list(value) if isinstance(value, tuple) else value, allowed, "correct it")
    if size > 1 and settings.is_elastic and settings.scaling == "stock":
        allowed = "must be graceful in groups: Ray Train's own policy knows no whole groups"
        raise ConfigError("scaling", "stock", allowed, "remove it")


def _check_length(settings: "TrainSettings") -> None:
    """Want exactly one of `steps` and `tokens`, and more steps than the warm-up has."""
    if (settings.steps is None) == (settings.tokens is None):
        value = "neither" if settings.steps is None else f"{settings.steps} and {settings.tokens}"
        raise ConfigError("steps or tokens", value, "must be given, exactly one of them", "give one")
    if settings.schedule.warmup_steps >= settings.num_steps:
        allowed = f"must be below the number of steps ({settings.num_steps})"
        raise ConfigError("schedule.warmup_steps", settings.schedule.warmup_steps, allowed, "lower it")


def _check_profile(settings: "TrainSettings") -> None:
    """Want steps that will run, in order."""
    if (
        settings.profile_steps is not None
        and not settings.profile_steps[0] <= settings.profile_steps[1] <= settings.num_steps
    ):
        allowed = f"must be [first, last] within the steps, 1 to {settings.num_steps}"
        raise ConfigError("profile_steps", list(settings.profile_steps), allowed, "correct it")


def _check_grid(settings: "TrainSettings") -> None:
    """Want a batch of whole micro-batches, at least one for each worker."""
    unit = settings.micro_batch * settings.seq_len
    if settings.batch_tokens % unit:
        allowed = f"must be a multiple of micro_batch * seq_len ({settings.micro_batch} * {settings.seq_len} = {unit})"
        raise ConfigError(
            "batch_tokens", settings.batch_tokens, allowed, f"try {_round_up(settings.batch_tokens, unit)}"
        )
    most = settings.num_micro_batches * settings.parallel.rows_shared_by
    if settings.max_workers > most:
        together = f" times {settings.parallel.rows_shared_by}" if settings.parallel.rows_shared_by > 1 else ""
        allowed = f"must be at most {most}, the micro-batches of a step (batch_tokens / {unit}){together}"
        raise ConfigError("num_workers", settings.num_workers, allowed, "ask for fewer workers or larger batches")


def _check_muon(settings: "TrainSettings") -> None:
    """Refuse clipping where DeepSpeed would clip Muon's update instead of the gradient.

    Source: DeepSpeed 0.19.8, stage_1_and_2.py `step` and stage3.py `step`: the norm is taken after Muon ran.
    """
    if settings.optimizer.kind == "muon" and settings.lora is not None:
        action = 'use kind = "adamw"'
        raise ConfigError("optimizer.kind", "muon", "must be adamw with lora: A and B are factors", action)
    if settings.optimizer.kind == "muon" and settings.zero_stage >= 1 and settings.gradient_clipping > 0:
        allowed = "must be 0 with Muon in ZeRO 1-3, where DeepSpeed clips the orthogonalized update"
        action = "set it to 0 (Muon's update does not grow with the gradient), or set zero_stage to 0"
        raise ConfigError("gradient_clipping", settings.gradient_clipping, allowed, action)


def _check_fp8(settings: "TrainSettings") -> None:
    """Refuse FP8 beside what it is not made for."""
    if settings.fp8 and settings.precision != "bf16":
        raise ConfigError("fp8", True, f"must be off with precision {settings.precision}", "use bf16, or remove it")
    if settings.fp8 and settings.lora is not None:
        raise ConfigError("fp8", True, "must be off with lora, whose adapters are small", "remove one of them")


def _round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit
