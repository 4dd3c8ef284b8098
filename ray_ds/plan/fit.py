"""Refusing what cannot fit, in words that say what would."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ray_ds.config.parallel import OFFLOADS, ZERO_STAGES
from ray_ds.errors import ConfigError
from ray_ds.plan.case import Case
from ray_ds.plan.choose import largest_micro_batch
from ray_ds.plan.devices import Fleet
from ray_ds.plan.memory import memory_of

GIB = 1 << 30


def check_fits(case: Case, fleet: Fleet, *, step: str) -> None:
    """Check that a worker's part of a case fits a device of the fleet.

    Raises:
        ConfigError: it does not; the message names the largest micro-batch that does, and stages that need less.
    """
    memory = memory_of(case)
    room = fleet.kind.memory_bytes
    if memory.needed <= room:
        return
    has = f"{room / GIB:.1f} GiB of a {fleet.kind.name}"
    needs = f"{memory.needed / GIB:.1f} GiB are needed {when(memory.peak_moment)}"
    ways = _ways(case, fleet, step)
    if not ways:
        *_, last = _more_frugal(case)
        starts = memory_of(last.with_micro_batch(1)).peak_moment == "starting"
        most = f"recomputed with ZeRO {last.zero_stage}"
        allowed = f"must fit the {has} with {case.world_size} workers, and not even a row does, {most}"
        whole = "the whole model" if case.parallel.held_by == 1 else "all of its part of the model"
        more = f"every worker starts with {whole} in fp32: use larger GPUs" if starts else "use more workers"
        value = f"{case.num_parameters / 1e9:.3g} billion parameters"
        raise ConfigError(f"{step}.model", value, allowed, f"{more}, or a smaller model ({needs})")
    largest = largest_micro_batch(case, fleet)
    if largest:
        allowed = f"must be at most {largest} to fit the {has}; {needs}"
        raise ConfigError(f"{step}.micro_batch", case.micro_batch, allowed, f"set {ways[0]}")
    allowed = f"must be one whose state fits the {has}; {needs}"
    raise ConfigError(f"{step}.zero_stage", case.zero_stage, allowed, f"set {' or '.join(ways)}")


def when(moment: str) -> str:
    """Return a moment's name as part of a sentence."""
    return f"while {moment}"


def _ways(case: Case, fleet: Fleet, step: str) -> list[str]:
    """Return overrides that make it fit, the least change first; with more offload only where nothing else does."""
    found: list[str] = []
    offload = case.offload
    for tried in _more_frugal(case):
        if found and tried.offload != offload:
            break
        offload = tried.offload
        if size := largest_micro_batch(tried, fleet):
            changes = zip(_overrides(tried.with_micro_batch(size), step), _overrides(case, step), strict=True)
            found.append(" ".join(new for new, old in changes if new != old))
    return found


def _more_frugal(case: Case) -> Iterator[Case]:
    """Yield cases that training allows and that take less, the least change first."""
    offloads = OFFLOADS[OFFLOADS.index(case.offload) :]
    stages = [stage for stage in ZERO_STAGES if stage >= case.zero_stage]
    for offload, stage, recompute in product(offloads, stages, sorted({case.recompute, True})):
        tried = replace(case, offload=offload, zero_stage=stage, recompute=recompute)
        if tried.refusal() is None:
            yield tried


def _overrides(case: Case, step: str) -> list[str]:
    """Return the settings that `_more_frugal` changes, as options."""
    settings = {
        "zero_stage": case.zero_stage,
        "micro_batch": case.micro_batch,
        "recompute_activations": str(case.recompute).lower(),
        "offload": case.offload,
    }
    return [f"--{step}.{name}={value}" for name, value in settings.items()]
