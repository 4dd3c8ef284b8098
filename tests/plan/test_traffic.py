"""The plan's bytes sent within a group against what real processes hand to their exchanges."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ds.config.parallel import AXES, Axis, Parallel
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.plan.case import Case
from ray_ds.plan.devices import Fleet, find_kind
from ray_ds.plan.traffic import data_bytes, group_bytes, host_bytes, sending_s
from tests.plan.kept_tensors import CONFIGS, case_for
from tests.train.zero.worlds import run_world

MODELS: Mapping[Axis, tuple[str, ...]] = {
    "tensor": ("dense", "query rank", "grouped queries"),
    "expert": ("experts",),
    "sequence": ("dense", "narrow values", "grouped queries"),
}
CASES = [(axis, name, recompute) for axis in AXES for name in MODELS[axis] for recompute in (False, True)]
Sent = Mapping[tuple[str, str, bool], float]


def group_case(axis: Axis, name: str, recompute: bool) -> Case:
    return case_for(CONFIGS[name](2), world_size=2, parallel=Parallel(**{axis: 2}), recompute=recompute)


def count(rank: int, world_size: int, folder: Path) -> None:
    found = {key: sent_bytes(group_case(*key), rank) for key in CASES}
    torch.save(found, folder / f"{rank}.pt")


def sent_bytes(case: Case, rank: int) -> float:
    """Return what a process of two sends in a micro-batch: half of what it exchanges, and for a sum that twice."""
    from ray_ds.train.parallel.divide import divide
    from ray_ds.train.parallel.mesh import make_mesh

    sent = 0.0

    def all_reduce(x: torch.Tensor, **given: Any) -> None:
        nonlocal sent
        sent += 2 * x.nbytes / 2
        plain_reduce(x, **given)

    def all_to_all(out: torch.Tensor, x: torch.Tensor, *given: Any, **named: Any) -> None:
        nonlocal sent
        sent += x.nbytes / 2
        plain_exchange(out, x, *given, **named)

    plain_reduce, plain_exchange = dist.all_reduce, dist.all_to_all_single
    decoder = Decoder(case.config, recompute_activations=case.recompute)
    init_weights(decoder, 0)
    divide(decoder, make_mesh(case.parallel, rank=rank, world_size=2))
    decoder = decoder.to(torch.bfloat16).train()
    tokens = torch.randint(case.config.vocab_size, (case.micro_batch, case.seq_len))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        decoder(tokens, tokens).backward()
    return sent


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """Return the means over both processes: experts' rows are not shared out evenly."""
    folder = tmp_path_factory.mktemp("sent")
    run_world(2, count, folder)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return {key: (first[key] + second[key]) / 2 for key in first}


@pytest.mark.parametrize(("axis", "name", "recompute"), CASES)
@pytest.mark.shows("What the plan says a group's workers send is what real processes send")
def test_sent_within_a_group(counted: Sent, axis: Axis, name: str, recompute: bool) -> None:
    assert group_bytes(group_case(axis, name, recompute)) == pytest.approx(counted[axis, name, recompute], rel=0.1)


def test_one_worker_sends_nothing() -> None:
    case = case_for(CONFIGS["dense"](2))
    assert sending_s(case, Fleet(kind=find_kind("h200"), num_devices=1)) == 0 and host_bytes(case) == 0


def test_copies_of_a_divided_model_send_their_part() -> None:
    config = CONFIGS["experts"](2)
    whole, part = (
        case_for(config, world_size=8, parallel=Parallel(expert=size), batch_tokens=8 * 512) for size in (1, 4)
    )
    others = (2 - 1) / 2 / ((8 - 1) / 8)
    fraction = part.num_held_parameters / whole.num_held_parameters
    assert data_bytes(part) == pytest.approx(data_bytes(whole) * fraction * others)


def test_what_is_offloaded_goes_to_the_host_and_back() -> None:
    config = CONFIGS["dense"](2)
    ways = [
        case_for(config, offload=offload, zero_stage=stage, batch_tokens=count * 512)
        for offload, stage, count in (("optimizer", 1, 4), ("optimizer", 2, 1), ("optimizer", 2, 4), ("all", 3, 4))
    ]
    assert [host_bytes(case) / case.num_parameters for case in ways] == [6, 6, 6 + 2 * 7, 6 + 2 * 2 * 4]
