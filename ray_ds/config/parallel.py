"""What training may divide over processes, and which ways of dividing go together: the one table of both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from pydantic import PositiveInt

from ray_ds.config.model import ModelConfig
from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

Axis = Literal["tensor", "expert", "sequence"]
Offload = Literal["none", "optimizer", "all"]
AXES: tuple[Axis, ...] = get_args(Axis)
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
ZERO_STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
ATTENTIONS = ("mla", "gqa")


@settings
class Parallel:
    """Into how many processes a group divides one model; groups train on different rows, beside each other.

    At most one of these is above 1. The processes of a group are neighbours, so that they share a node's fast links.
    """

    tensor: PositiveInt = 1
    """Processes that share each layer's heads and its MLP's inner width (Megatron, arXiv 1909.08053, section 3): each
    has that part of these weights, and all have the same rows."""
    expert: PositiveInt = 1
    """Processes that share each layer's routed experts (GShard, arXiv 2006.16668): tokens travel to their experts and
    back. Each process has rows of its own."""
    sequence: PositiveInt = 1
    """Processes that share each row's tokens (Ulysses, arXiv 2309.14509): in attention each has all tokens of some
    heads. For rows too long for one device."""

    @property
    def axis(self) -> Axis | None:
        """What is divided; None where groups are of one process."""
        return next((axis for axis in AXES if getattr(self, axis) > 1), None)

    @property
    def group_size(self) -> int:
        """Processes that train only together."""
        return self.tensor * self.expert * self.sequence

    @property
    def rows_shared_by(self) -> int:
        """Processes that train on the same rows."""
        return self.tensor * self.sequence

    @property
    def held_by(self) -> int:
        """Processes that hold one copy of all weights between them, before ZeRO divides it further."""
        return self.tensor * self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A cell of the table: what decides whether settings go together."""

    axes: tuple[Axis, ...]
    """Those above 1."""
    zero_stage: int
    offload: Offload
    precision: str
    optimizer: str
    attention: str
    has_experts: bool
    objective: str = "next_token"
    has_adapters: bool = False
    is_fp8: bool = False
    is_compiled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A refusal: which choices it is for, and what it says."""

    refuses: Callable[[Choice], bool]
    field: str
    """The setting that is wrong, dotted."""
    allowed: str
    action: str


RULES: tuple[Rule, ...] = (
    Rule(
        refuses=lambda c: c.precision == "fp16" and c.zero_stage == 0,
        # DeepSpeed 0.19.8, engine.py `backward` scales for a `ZeROOptimizer` only, while stage 0's
        # `FP16_UnfusedOptimizer.step` divides the gradient by the scale all the same.
        field="zero_stage",
        allowed="must be 1, 2 or 3 with fp16: DeepSpeed does not scale the loss in ZeRO 0",
        action="use 1, or precision bf16",
    ),
    Rule(
        refuses=lambda c: c.offload != "none" and c.zero_stage == 0,
        field="offload",
        allowed="has no effect in ZeRO 0",
        action="remove it, or use zero_stage 1, 2 or 3",
    ),
    Rule(
        refuses=lambda c: c.offload == "all" and c.zero_stage in (1, 2),
        field="offload",
        allowed="must be none or optimizer below ZeRO 3, where every process computes with all of its weights",
        action="use optimizer, or zero_stage 3",
    ),
    Rule(
        refuses=lambda c: c.offload != "none" and c.optimizer == "muon",
        field="offload",
        allowed="must be none with Muon: DeepSpeed's way with both is not held to plain Muon by a test",
        action="remove it, or use AdamW",
    ),
    Rule(
        refuses=lambda c: len(c.axes) > 1,
        field="parallel",
        allowed="must have one field above 1 at most: a process is in one group",
        action="keep the one that saves the most memory",
    ),
    Rule(
        refuses=lambda c: c.zero_stage == 3 and ("tensor" in c.axes or "expert" in c.axes),
        field="zero_stage",
        allowed="must be 0, 1 or 2 with parallel.tensor and parallel.expert: ZeRO 3 would gather weights that differ "
        "within a group as if they were one",
        action="use 2, or parallel.sequence",
    ),
    Rule(
        refuses=lambda c: "tensor" in c.axes and c.has_experts,
        field="parallel.tensor",
        allowed="must be 1 in a model with experts, most of whose weights it would leave whole",
        action="use parallel.expert",
    ),
    Rule(
        refuses=lambda c: "expert" in c.axes and not c.has_experts,
        field="parallel.expert",
        allowed="has no effect in a dense model",
        action="remove it, or use parallel.tensor",
    ),
    Rule(
        refuses=lambda c: c.optimizer == "muon" and ("tensor" in c.axes or "expert" in c.axes),
        field="optimizer.kind",
        allowed="must be adamw with parallel.tensor and parallel.expert: Muon's update is of whole matrices and its "
        "norm would count what a group holds twice",
        action="use AdamW, or parallel.sequence",
    ),
    Rule(
        refuses=lambda c: c.precision == "fp16" and bool(c.axes),
        field="precision",
        allowed="must be fp32 or bf16 in groups: fp16 runs on GPUs alone, where no test holds it to one process",
        action="use bf16",
    ),
    Rule(
        refuses=lambda c: c.objective != "next_token" and bool(c.axes),
        field="objective.kind",
        allowed="must be next_token in groups: a second model or whole rows' logits would have to be divided too",
        action="remove parallel",
    ),
    Rule(
        refuses=lambda c: c.has_adapters and bool(c.axes),
        field="lora.rank",
        allowed="must be absent in groups: adapters beside divided weights would have to be divided too",
        action="remove parallel, or lora",
    ),
    Rule(
        refuses=lambda c: c.is_fp8 and bool(c.axes),
        field="fp8",
        allowed="must be off in groups: it runs on GPUs alone, where no test holds it to one process",
        action="remove it",
    ),
    Rule(
        refuses=lambda c: c.is_compiled and bool(c.axes),
        field="compile",
        allowed="must be off in groups: the exchanges between processes break the graph in every layer",
        action="remove it",
    ),
)
"""Every combination that none of these refuses is supported."""

ELASTIC = "the number of groups, in whole groups; the size of a group is fixed while the run goes on"
"""What `num_workers = [min, max]` may change."""


def refusal(choice: Choice) -> Rule | None:
    """Return the first rule that refuses a choice; None where it is supported."""
    return next((rule for rule in RULES if rule.refuses(choice)), None)


def all_choices() -> Iterator[Choice]:
    """Yield the whole table; more than two axes at once are left out."""
    several: list[tuple[Axis, ...]] = [(one, two) for one in AXES for two in AXES if one < two]
    axes: list[tuple[Axis, ...]] = [(), *((axis,) for axis in AXES), *several]
    for cell in product(axes, ZERO_STAGES, OFFLOADS, PRECISIONS, OPTIMIZERS, ATTENTIONS, (False, True)):
        names = ("axes", "zero_stage", "offload", "precision", "optimizer", "attention", "has_experts")
        yield Choice(**dict(zip(names, cell, strict=True)))  # type: ignore[arg-type]


def check_sizes(parallel: Parallel, config: ModelConfig, seq_len: int) -> None:
    """Refuse groups that a model or its rows cannot be divided into.

    Raises:
        ConfigError: a size has a remainder.
    """
    heads = {"num_attention_heads": config.num_attention_heads}
    if config.attention == "gqa":
        heads["num_key_value_heads"] = config.num_key_value_heads
    divided: dict[Axis, dict[str, int]] = {
        "tensor": {**heads, "intermediate_size": config.intermediate_size},
        "expert": {"n_routed_experts": config.n_routed_experts},
        "sequence": {**heads, "seq_len": seq_len},
    }
    if parallel.axis is None:
        return
    size = getattr(parallel, parallel.axis)
    for name, value in divided[parallel.axis].items():
        if value % size:
            raise ConfigError(f"parallel.{parallel.axis}", size, f"must divide {name} ({value})", "correct one of them")


def support_table() -> str:
    """Return what is supported as a Markdown table, a row an axis, for the README."""
    supported = [choice for choice in all_choices() if refusal(choice) is None]
    head = ("divided over processes", "ZeRO", "offload", "precision", "optimizer", "model", "elastic")
    rows = [head, tuple("---" for _ in head)]
    for axis in (None, *AXES):
        cells = [choice for choice in supported if choice.axes == ((axis,) if axis else ())]
        offloads = [(name, sorted({c.zero_stage for c in cells if c.offload == name})) for name in OFFLOADS[1:]]
        offloads = [(name, stages) for name, stages in offloads if stages]
        rows.append(
            (
                axis or "rows alone (data)",
                _list(sorted({c.zero_stage for c in cells})),
                "; ".join(f"{name} (ZeRO {_list(stages)})" for name, stages in offloads),
                _list([name for name in PRECISIONS if any(c.precision == name for c in cells)]),
                _list([name for name in OPTIMIZERS if any(c.optimizer == name for c in cells)]),
                _models(cells),
                "number of workers" if axis is None else "number of groups",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _models(cells: list[Choice]) -> str:
    kinds = {False: "dense", True: "experts"}
    models = [name for has, name in kinds.items() if any(c.has_experts == has for c in cells)]
    attentions = [name.upper() for name in ATTENTIONS if any(c.attention == name for c in cells)]
    return f"{_list(models)}; {_list(attentions)}"


def _list(values: list[int] | list[str]) -> str:
    return ", ".join(map(str, values))
