from typing import Annotated, Literal

import pytest

from ray_ds.config.settings import (
    OUTPUT_UNCHANGED,
    OutputUnchangedUnless,
    as_json,
    decode_settings,
    digest_settings,
    field_docs,
    settings,
)
from ray_ds.errors import ConfigError


@settings
class Inner:
    lr: float = 1e-3
    """Peak learning rate."""
    kind: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer."""


@settings
class Outer:
    steps: int
    """Optimizer steps."""
    names: tuple[str, ...] = ()
    """Some names."""
    inner: Inner = Inner()
    """A nested table."""
    num_workers: Annotated[int, OUTPUT_UNCHANGED] = 1
    """Processes."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "must be at least 1", "raise it")


@settings
class Search:
    kind: Literal["greedy", "beam"] = "greedy"
    """How to search."""
    beams: Annotated[int, OutputUnchangedUnless("kind", "beam")] = 4
    """Its width."""


@settings
class Draw:
    kind: Literal["greedy", "top_k", "top_p"] = "greedy"
    """How to draw."""
    temperature: Annotated[float, OutputUnchangedUnless("kind", "top_k"), OutputUnchangedUnless("kind", "top_p")] = 1.0
    """How evenly."""


def test_toml_values_become_settings() -> None:
    decoded = decode_settings(Outer, {"steps": 3, "names": ["a"], "inner": {"lr": 1}}, where="r.toml: s")
    assert decoded == Outer(steps=3, names=("a",), inner=Inner(lr=1.0))
    assert as_json(decoded) == {
        "steps": 3,
        "names": ["a"],
        "inner": {"lr": 1.0, "kind": "adamw"},
        "num_workers": 1,
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"steps": "3"}, r"^r.toml: s.steps \(3\) must be a valid integer; correct it"),
        ({"steps": 3, "stepz": 4}, r"^r.toml: s.stepz \(4\) must be one of the known settings: steps, names, inner"),
        ({"steps": 3, "inner": {"lrr": 1}}, r"^r.toml: s.inner.lrr \(1\) must be one of the known settings: lr, kind;"),
        ({"steps": 3, "inner": {"kind": "lion"}}, r"^r.toml: s.inner.kind \(lion\) must be 'adamw' or 'sgd'; correct"),
        ({}, r"^r.toml: s.steps \(missing\) must be given; add it to the recipe"),
        ({"steps": 0}, r"^r.toml: s.steps \(0\) must be at least 1; raise it"),
        ({"steps": True}, r"^r.toml: s.steps \(True\) must be a valid integer"),
        ({"steps": 1.5}, r"^r.toml: s.steps \(1.5\) must be a valid integer"),
    ],
)
def test_errors_name_field_value_allowed_and_action(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_settings(Outer, raw, where="r.toml: s")


def test_the_digest_leaves_out_what_cannot_change_the_output() -> None:
    assert digest_settings(Outer(steps=1, num_workers=1)) == digest_settings(Outer(steps=1, num_workers=9))
    assert digest_settings(Outer(steps=1)) != digest_settings(Outer(steps=2))
    assert digest_settings(Search(beams=1)) == digest_settings(Search(beams=9)) == {"kind": "greedy"}
    assert digest_settings(Search(kind="beam", beams=9)) == {"kind": "beam", "beams": 9}
    assert digest_settings(Draw(temperature=0.5)) == {"kind": "greedy"}
    for kind in ("top_k", "top_p"):
        assert digest_settings(Draw(kind=kind, temperature=0.5)) == {"kind": kind, "temperature": 0.5}


def test_fields_carry_their_docstrings() -> None:
    assert field_docs(Outer)["steps"] == "Optimizer steps."
    assert field_docs(Inner) == {"lr": "Peak learning rate.", "kind": "Which optimizer."}
