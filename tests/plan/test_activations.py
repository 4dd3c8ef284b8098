"""The plan's bytes of activations against the tensors that autograd keeps, on the code that runs on a GPU."""

from typing import Any

import pytest

from ray_ds.plan.activations import activations_of, layer_bytes
from tests.plan.kept_tensors import CONFIGS, case_for, kept_bytes, use_gpu_norm


@pytest.fixture(autouse=True)
def gpu_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu_norm(monkeypatch)


ways = pytest.mark.parametrize(
    "way", [{}, {"recompute": True}, {"compile": True}], ids=["eager", "recomputed", "compiled"]
)


@ways
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.shows("The plan's memory of activations is what autograd keeps, eager, compiled and recomputed")
def test_kept_activations(name: str, way: dict[str, Any]) -> None:
    case = case_for(CONFIGS[name](2), **way)
    planned = activations_of(case)
    assert planned.kept + planned.loss == pytest.approx(kept_bytes(case), rel=0.1)


@pytest.mark.parametrize("way", [{}, {"compile": True}], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["dense", "grouped queries", "experts"])
def test_one_more_layer(name: str, way: dict[str, Any]) -> None:
    """A layer alone, so that what lies on top cannot hide an error of the many below."""
    two, three = (case_for(CONFIGS[name](depth), **way) for depth in (2, 3))
    grown = (kept_bytes(three) - kept_bytes(two)) / two.micro_tokens
    assert layer_bytes(two, is_sparse=name == "experts") == pytest.approx(grown, rel=0.1)


def test_activations_grow_with_the_micro_batch() -> None:
    one, four = (activations_of(case_for(CONFIGS["dense"](2), micro_batch=rows)) for rows in (1, 4))
    assert four.kept == pytest.approx(4 * one.kept)
    assert four.peak > one.peak
