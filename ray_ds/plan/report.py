"""The plan of a train step as lines for people."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ray_ds.config.model_size import flops_per_token, num_active_parameters
from ray_ds.config.parallel import OFFLOADS, ZERO_STAGES
from ray_ds.plan.case import Case
from ray_ds.plan.choose import Plan, best_plan, largest_micro_batch, plan_of
from ray_ds.plan.devices import Fleet
from ray_ds.plan.fit import GIB, when
from ray_ds.plan.memory import CONTEXT_BYTES, FRAGMENTATION, Memory
from ray_ds.plan.traffic import HOST_LINK_BYTES_PER_S, data_bytes, group_bytes, host_bytes

HEAD = (
    "ZeRO",
    "offload",
    "weights",
    "masters",
    "optimizer",
    "gradients and buckets",
    "activations",
    "loss",
    "peak",
    "needed",
    "fits",
    "host",
    "micro-batch",
    "recomputed",
    "tokens/s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is to be trained on, and what it may be paid with."""

    tokens: int
    steps: int
    gpu_hour_price: float | None
    """Of one GPU, in any currency; None where no cost is to be told."""


def plan_lines(step: str, case: Case, fleet: Fleet, budget: Budget) -> list[str]:
    """Return the plan of a step: sizes, a table by ZeRO stage, time and cost as it stands, and the fastest settings."""
    return [
        *_head_lines(step, case, fleet),
        "",
        *_table([HEAD, *_stage_rows(case, fleet)]),
        "",
        *_note_lines(),
        *_refusal_lines(case),
        "",
        *_outcome_lines("as the recipe says", plan_of(case, fleet), budget),
        *_best_lines(step, case, fleet, budget),
    ]


def _head_lines(step: str, case: Case, fleet: Fleet) -> list[str]:
    config, kind = case.config, fleet.kind
    active = num_active_parameters(config)
    return [
        f"step {step}: {case.num_parameters:,} parameters, {active:,} active, "
        f"{flops_per_token(config, case.seq_len) / 1e9:.3g} GFLOP a token of rows of {case.seq_len:,}",
        f"{case.world_size} x {kind.name}: {kind.memory_bytes / GIB:.1f} GiB, "
        f"{kind.peak_flops / 1e12:.4g} TFLOP/s bf16, {kind.bandwidth / 1e9:,.4g} GB/s ({kind.source}); between workers "
        f"{fleet.wire_bandwidth(case.world_size) / 1e9:.3g} GB/s",
        f"{case.precision}, {'compiled' if case.compile else 'eager'}, "
        f"{'Muon' if case.uses_muon else 'AdamW'}, micro-batch {case.micro_batch}, {case.batch_tokens:,} tokens a step"
        + (", activations recomputed" if case.recompute else "")
        + (f", {case.offload} on the host" if case.offload != "none" else "")
        + (f", groups of {case.parallel.group_size} ({case.parallel.axis})" if case.parallel.axis else ""),
    ]


def _stage_rows(case: Case, fleet: Fleet) -> list[tuple[str, ...]]:
    """Return a row for each stage and offload that training allows; sizes in GiB a worker."""
    rows = []
    for tried in _stages(case):
        if tried.refusal() is not None:
            continue
        plan = plan_of(tried, fleet)
        kept = largest_micro_batch(replace(tried, recompute=False), fleet)
        again = largest_micro_batch(replace(tried, recompute=True), fleet)
        row = (
            str(tried.zero_stage),
            tried.offload,
            *(f"{size / GIB:.1f}" for size in _parts(plan.memory)),
            "yes" if plan.fits else "no",
            f"{plan.memory.states.host / GIB:.1f}" if plan.memory.states.host else "-",
            str(kept or "-"),
            str(again or "-"),
            f"{plan.speed.tokens_per_s:,.0f}" if plan.fits else "-",
        )
        rows.append(row)
    return rows


def _stages(case: Case) -> Iterator[Case]:
    for stage, offload in product(ZERO_STAGES, OFFLOADS):
        yield replace(case, zero_stage=stage, offload=offload)


def _refusal_lines(case: Case) -> list[str]:
    """Return why rows are left out, each reason once, with the stages and offloads it is for."""
    left_out: dict[str, list[str]] = {}
    for tried in _stages(case):
        rule = tried.refusal()
        if rule is not None:
            name = f"{tried.zero_stage} {tried.offload}".removesuffix(" none")
            left_out.setdefault(f"{rule.field} {rule.allowed}", []).append(name)
    return [f"left out, ZeRO {', '.join(names)}: {reason}" for reason, names in left_out.items()]


def _parts(memory: Memory) -> tuple[int, ...]:
    """Return the bytes of a row's columns."""
    states, activations = memory.states, memory.activations
    return (
        states.weights + states.gathered,
        states.masters,
        states.optimizer,
        states.buffers + max(states.reducing, states.updating, states.earlier_gradients),
        activations.kept + activations.again,
        activations.loss + activations.loss_work,
        memory.peak,
        memory.needed,
    )


def _note_lines() -> list[str]:
    return [
        "GiB a worker. The peak is that of the fullest moment, so less than the sum of all moments' parts.",
        f"needed = peak + {FRAGMENTATION:.0%} between tensors + {CONTEXT_BYTES / GIB:.1f} GiB of CUDA, cuBLAS and NCCL "
        "(assumed).",
        "micro-batch, recomputed: the most rows that fit and divide the step's batch, without and with recomputation.",
        "host: what offload keeps in the host's memory for a worker.",
    ]


def _outcome_lines(title: str, plan: Plan, budget: Budget) -> list[str]:
    """Return whether a plan fits, how fast it is, how long the budget takes and what it costs."""
    memory, case = plan.memory, plan.case
    lines = [
        f"{title}: {'fits' if plan.fits else 'DOES NOT FIT'}, {memory.needed / GIB:.1f} GiB {when(memory.peak_moment)}"
    ]
    if not plan.fits:
        return lines
    seconds = budget.steps * plan.speed.step_s
    lines.append(
        f"  {plan.speed.tokens_per_s:,.0f} tokens/s, {plan.speed.step_s:.3g} s a step: "
        f"{budget.tokens:,} tokens in {budget.steps:,} steps take {duration(seconds)}"
    )
    if case.parallel.axis:
        lines.append(
            f"  a worker sends {group_bytes(case) / GIB:.2f} GiB to its group and {data_bytes(case) / GIB:.2f} GiB "
            "to others in a step"
        )
    if case.offload != "none":
        lines.append(
            f"  {memory.states.host / GIB:.1f} GiB in the host's memory for each worker; {host_bytes(case) / GIB:.2f} "
            f"GiB between both take {host_bytes(case) / HOST_LINK_BYTES_PER_S:.2g} s of a step"
        )
    if budget.gpu_hour_price is not None:
        hours = seconds / 3600 * case.world_size
        lines.append(f"  {hours:,.1f} GPU hours at {budget.gpu_hour_price:g}: {hours * budget.gpu_hour_price:,.2f}")
    return lines


def _best_lines(step: str, case: Case, fleet: Fleet, budget: Budget) -> list[str]:
    best = best_plan(case, fleet)
    if best is None:
        return ["nothing fits: not one row at any ZeRO stage, recomputed; use more or larger GPUs, or a smaller model"]
    found = best.case
    overrides = (
        f"--{step}.zero_stage={found.zero_stage} --{step}.micro_batch={found.micro_batch} "
        f"--{step}.recompute_activations={str(found.recompute).lower()} --{step}.num_workers={found.world_size}"
    )
    return _outcome_lines(f"fastest that fits: {overrides}", best, budget)


def duration(seconds: float) -> str:
    """Return a time in the largest unit that it has two of."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns aligned on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
