from dataclasses import replace
from typing import Any

import pytest

from ray_ds.config.model_size import flops_per_token
from ray_ds.config.presets import PRESETS
from ray_ds.plan.devices import Fleet, find_kind
from ray_ds.plan.matrices import layer_matrices, num_heads_used
from ray_ds.plan.speed import COPY_FRACTION, speed_of
from tests.plan.measured import BARE, DENSE, TRAINED, Run

H200 = Fleet(kind=find_kind("h200"), num_devices=1)
BARE_ADAMW_BYTES = 16
"""A parameter's reads and writes in a bare AdamW with everything in bf16: weight, gradient and two means."""


@pytest.mark.parametrize("run", TRAINED, ids=lambda run: run.name)
@pytest.mark.shows("The tokens per second that a plan was fitted to, on one H200, are within 20 % of what it says")
def test_training_as_measured(run: Run) -> None:
    assert speed_of(run.case, H200).tokens_per_s == pytest.approx(run.tokens_per_s, rel=0.2)


@pytest.mark.parametrize("run", BARE, ids=lambda run: run.name)
def test_bare_loops_as_measured(run: Run) -> None:
    speed = speed_of(run.case, H200)
    update = run.case.num_parameters * BARE_ADAMW_BYTES / (H200.kind.bandwidth * COPY_FRACTION)
    tokens_per_s = run.case.batch_tokens / (speed.step_s - speed.update + update)
    assert tokens_per_s == pytest.approx(run.tokens_per_s, rel=0.2)


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_are_those_of_the_count(name: str) -> None:
    """6 for each number of a matrix that a token meets, and attention: `flops_per_token` but for norms and biases."""
    config = PRESETS[name]
    matrices = sum(matrix.used * matrix.numel for matrix in layer_matrices(config))
    matrices += num_heads_used(config) * config.vocab_size * config.hidden_size
    seq_len = 1024
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    attention = 3 * layers * config.num_attention_heads * (config.qk_head_dim + config.value_head_dim) * seq_len
    assert 6 * matrices + attention == pytest.approx(flops_per_token(config, seq_len), rel=3e-3)


@pytest.mark.parametrize(
    ("change", "is_faster"),
    [
        ({"recompute": True}, False),
        ({"compile": False}, False),
        ({"precision": "fp32"}, False),
        ({"micro_batch": 1}, False),
        ({"zero_stage": 3}, False),
        ({"offload": "optimizer"}, False),
        ({"batch_tokens": 1 << 20}, True),
    ],
    ids=str,
)
def test_what_makes_it_faster_and_slower(change: dict[str, Any], is_faster: bool) -> None:
    case = TRAINED[1].case
    changed = replace(case, **change)
    assert (speed_of(changed, H200).tokens_per_s > speed_of(case, H200).tokens_per_s) == is_faster


def test_more_workers_are_faster_but_less_than_in_proportion() -> None:
    case = TRAINED[1].case
    one, eight, sixteen = (
        speed_of(replace(case, world_size=size), replace(H200, num_devices=size)).tokens_per_s for size in (1, 8, 16)
    )
    assert 4 * one < eight < 8 * one
    assert eight < sixteen < 2 * eight


def test_workers_on_several_nodes_send_over_the_network() -> None:
    assert H200.wire_bandwidth(8) == 450e9
    assert H200.wire_bandwidth(9) == 50e9


def test_the_model_measured_is_the_preset() -> None:
    assert 0.370e9 < TRAINED[0].case.num_parameters < 0.372e9
    assert PRESETS["dense_350m"] is DENSE
