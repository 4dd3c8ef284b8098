"""What a check says: figures, what is wrong, and what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

Outcome = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong."""

    wrong: str
    """What was found, with the node and the value."""
    action: str
    """What mends it, in the imperative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The end of a check."""

    name: str
    outcome: Outcome
    figures: Mapping[str, JsonValue] = field(default_factory=dict)
    """What was measured."""
    problems: tuple[Problem, ...] = ()
    """Why it failed."""
    advice: tuple[str, ...] = ()
    """What works and could be better."""
    reason: str = ""
    """Why it is not applicable."""
    trace: str = ""
    """Where the check itself broke off."""
    seconds: float = 0.0
    """How long it took."""


def judged(
    name: str, figures: Mapping[str, JsonValue], problems: Sequence[Problem], advice: Sequence[str] = ()
) -> Finding:
    """Return a finding that passes where there are no problems."""
    outcome: Outcome = "failed" if problems else "passed"
    return Finding(name=name, outcome=outcome, figures=figures, problems=tuple(problems), advice=tuple(advice))


def not_applicable(name: str, reason: str, figures: Mapping[str, JsonValue] | None = None) -> Finding:
    """Return a finding of something that this cluster does not have."""
    return Finding(name=name, outcome="not applicable", reason=reason, figures=figures or {})
