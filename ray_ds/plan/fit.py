"""Refusing what cannot fit, in words that say what would."""

from dataclasses import replace

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
        starts = memory_of(replace(case, zero_stage=3, micro_batch=1)).peak_moment == "starting"
        allowed = f"must fit the {has} with {case.world_size} workers, and not even a row does, recomputed with ZeRO 3"
        more = "every worker starts with the whole model in fp32: use larger GPUs" if starts else "use more workers"
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
    """Return overrides that make it fit, the least change first."""
    found = []
    for stage in range(case.zero_stage, 4):
        for recompute in {case.recompute, True}:
            tried = replace(case, zero_stage=stage, recompute=recompute)
            if size := largest_micro_batch(tried, fleet):
                changes = {"zero_stage": stage, "micro_batch": size, "recompute_activations": str(recompute).lower()}
                now = (case.zero_stage, case.micro_batch, str(case.recompute).lower())
                given = [
                    f"--{step}.{name}={value}"
                    for (name, value), old in zip(changes.items(), now, strict=True)
                    if value != old
                ]
                found.append(" ".join(given))
    return found
