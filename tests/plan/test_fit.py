from dataclasses import replace
from typing import Any

import pytest

from ray_ds.config.parallel import Parallel
from ray_ds.config.presets import PRESETS
from ray_ds.errors import ConfigError
from ray_ds.plan.case import Case
from ray_ds.plan.choose import best_plan, largest_micro_batch, micro_batches_possible, plan_of
from ray_ds.plan.devices import Fleet, find_kind
from ray_ds.plan.fit import check_fits
from ray_ds.plan.memory import memory_of
from tests.plan.measured import DENSE_1B, TRAINED

CASE = TRAINED[1].case
H100 = Fleet(kind=find_kind("h100"), num_devices=8)
SMALL = Fleet(kind=find_kind("rtx4090"), num_devices=1)


def refused(case: Case, fleet: Fleet) -> str:
    with pytest.raises(ConfigError) as error:
        check_fits(case, fleet, step="pretrain")
    return str(error.value)


def test_what_fits_is_let_pass() -> None:
    check_fits(CASE, H100, step="pretrain")


@pytest.mark.shows("A micro-batch that cannot fit is refused with the largest that does")
def test_the_micro_batch_named_is_the_largest_that_fits() -> None:
    message = refused(CASE, SMALL)
    largest = largest_micro_batch(CASE, SMALL)
    assert message.startswith(f"pretrain.micro_batch (16) must be at most {largest} to fit the 24.0 GiB of a rtx4090; ")
    assert message.endswith(f"set --pretrain.micro_batch={largest}.")
    check_fits(CASE.with_micro_batch(largest), SMALL, step="pretrain")
    refused(CASE.with_micro_batch(2 * largest), SMALL)


def test_state_that_only_fits_in_slices() -> None:
    case = replace(
        CASE, config=replace(DENSE_1B, num_hidden_layers=96, first_k_dense_replace=96), world_size=8, zero_stage=0
    )
    message = refused(case, H100)
    assert message.startswith("pretrain.zero_stage (0) must be one whose state fits the 79.6 GiB of a h100; ")
    assert "--pretrain.zero_stage=1" in message


def test_a_model_that_fits_nowhere() -> None:
    case = replace(CASE, config=PRESETS["deepseek_v3"], world_size=64)
    message = refused(case, H100)
    assert message.startswith("pretrain.model (6") and "every worker starts with the whole model in fp32" in message
    assert best_plan(case, H100) is None


@pytest.mark.parametrize(
    "change", [{}, {"precision": "fp16"}, {"world_size": 8}, {"uses_muon": True}, {"compile": False}], ids=str
)
@pytest.mark.parametrize("fleet", [H100, SMALL], ids=["h100", "rtx4090"])
def test_the_fastest_plan_fits_and_keeps_what_decides_the_result(change: dict[str, Any], fleet: Fleet) -> None:
    case = replace(CASE, **change)
    best = best_plan(case, fleet)
    assert best is not None and best.memory.needed <= fleet.kind.memory_bytes
    found = best.case
    assert replace(found, micro_batch=16, zero_stage=case.zero_stage, recompute=case.recompute) == case
    assert found.batch_tokens % (found.micro_batch * found.seq_len * found.world_size) == 0
    assert found.zero_stage != 0 or case.precision != "fp16"
    own = plan_of(case, fleet)
    assert not own.fits or best.speed.tokens_per_s > 0.98 * own.speed.tokens_per_s


def test_micro_batches_divide_the_batch_and_leave_no_worker_without() -> None:
    case = replace(CASE, batch_tokens=24 * CASE.seq_len, world_size=4)
    assert micro_batches_possible(case) == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_rises_with_rows_and_falls_with_recomputation(stage: int, precision: Any) -> None:
    case = replace(CASE, zero_stage=stage, precision=precision)
    peaks = [memory_of(case.with_micro_batch(size)).peak for size in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks)
    assert memory_of(replace(case, recompute=True)).peak < memory_of(case).peak


def test_higher_stages_keep_less_with_many_workers() -> None:
    kept = [memory_of(replace(CASE, config=DENSE_1B, zero_stage=stage, world_size=8)).states.kept for stage in (0, 1)]
    assert kept[1] < kept[0] / 3
    with_offload = memory_of(replace(CASE, offload="optimizer")).states
    assert with_offload.kept < memory_of(CASE).states.kept and with_offload.host > 0


@pytest.mark.shows("Where only offload makes a step fit, the refusal says so")
def test_offload_is_named_where_nothing_else_helps() -> None:
    config = replace(DENSE_1B, num_hidden_layers=26, first_k_dense_replace=26)
    case = replace(CASE, config=config, batch_tokens=16 * CASE.seq_len)
    message = refused(case, SMALL)
    assert "--pretrain.offload=optimizer" in message and "--pretrain.offload=all" not in message


def test_a_group_that_divides_the_model_makes_it_fit() -> None:
    config = replace(DENSE_1B, num_hidden_layers=112, first_k_dense_replace=112)
    fleet = replace(SMALL, num_devices=8)
    whole = replace(CASE, config=config, world_size=8, compile=False, micro_batch=1, recompute=True)
    assert "every worker starts with the whole model in fp32" in refused(whole, fleet)
    check_fits(replace(whole, parallel=Parallel(tensor=8)), fleet, step="pretrain")


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_groups_take_less_each(axis: Any) -> None:
    case = replace(CASE, world_size=8, compile=False)
    divided = replace(case, parallel=Parallel(**{axis: 4}))
    assert memory_of(divided).peak < memory_of(case).peak
    assert memory_of(divided).activations.kept < 0.6 * memory_of(case).activations.kept


def test_the_fastest_plan_keeps_groups_and_what_training_refuses_is_not_tried() -> None:
    case = replace(CASE, world_size=8, compile=False, parallel=Parallel(tensor=2), offload="optimizer")
    best = best_plan(case, H100)
    assert best is not None and best.case.zero_stage in (1, 2)
    assert (best.case.parallel, best.case.offload) == (case.parallel, case.offload)
