import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch

from ray_ds.errors import ArtifactError
from ray_ds.train import packing
from ray_ds.train.host import Part
from ray_ds.train.packing import PackedState, pack
from ray_ds.train.state import EngineState, Piece, Stretch
from tests.train.states import assert_holds, extra_of, facts_of, make_parts


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("step", range(20))
def test_parts_of_any_number_of_ranks_are_read_by_any_other(step: int, world_size: int) -> None:
    state = PackedState(make_parts(step, world_size))
    assert_holds(state, step)
    assert state.extra == extra_of(step)
    assert state.own(world_size - 1) == {"random": f"{step}-{world_size - 1}"}
    assert state.own(world_size) == {}


def test_a_part_has_few_tensors_and_an_index_in_json() -> None:
    part = make_parts(3, 1)[0]
    assert set(part.tensors) == {"float32-00000", "bfloat16-00000", "float64-00000", "int64-00000"}
    assert all(tensor.dim() == 1 and tensor.device.type == "cpu" for tensor in part.tensors.values())
    assert json.loads(json.dumps(part.index)) == part.index


def test_a_part_outlives_the_state_it_was_packed_from() -> None:
    values = torch.ones(3)
    piece = Piece(name="w", kind="master", shape=(3,), start=0, values=values)
    state = EngineState(pieces=[piece], facts={})
    packed = PackedState([pack(state, step=1, rank=0, world_size=1, extra={})])
    values += 1
    assert packed.read("w", "master", 0, 3).tolist() == [1, 1, 1]
    packed.read("w", "master", 0, 3).zero_()
    assert packed.read("w", "master", 0, 3).tolist() == [1, 1, 1]


def test_large_pieces_go_on_in_the_next_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TENSOR_BYTES", 64)
    parts = make_parts(4, 2)
    assert len(parts[0].tensors) > 8
    assert max(tensor.nbytes for part in parts for tensor in part.tensors.values()) == 64
    assert_holds(PackedState(parts), 4)


class Travelling(dict[str, torch.Tensor]):
    """Tensors that note which were looked up."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.come: set[str] = set()

    def get(self, name: str, default: object = None) -> torch.Tensor:  # type: ignore[override]
        self.come.add(name)
        return self[name]


def test_only_tensors_that_hold_what_is_read_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TENSOR_BYTES", 40)
    pieces = [
        Piece(name="w", kind="master", shape=(100,), start=half, values=torch.arange(50.0) + half) for half in (0, 50)
    ]
    parts = [
        pack(EngineState(pieces=[piece], facts={}), step=1, rank=rank, world_size=2, extra={})
        for rank, piece in enumerate(pieces)
    ]
    travelling = [Travelling(part.tensors) for part in parts]
    state = PackedState(
        [dataclasses.replace(part, tensors=these) for part, these in zip(parts, travelling, strict=True)]
    )
    absent = Stretch(name="w", kind="exp_avg", start=0, stop=100)
    state.bring([Stretch(name="w", kind="master", start=39, stop=61), absent])
    assert [these.come for these in travelling] == [
        {"float32-00003", "float32-00004"},
        {"float32-00000", "float32-00001"},
    ]
    assert state.read("w", "master", 39, 61).tolist() == list(range(39, 61))
    assert sum(len(these.come) for these in travelling) == 4, "reading it looked up more"
    with pytest.raises(ArtifactError, match="no elements 100 to 101 of 100"):
        state.bring([Stretch(name="w", kind="master", start=90, stop=101)])


def test_memory_of_an_earlier_part_is_used_again() -> None:
    first = make_parts(1, 1)[0]
    places = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    piece = Piece(name="w", kind="master", shape=(2,), start=0, values=torch.tensor([5.0, 6.0]))
    state = EngineState(pieces=[piece], facts={})
    other = pack(state, step=2, rank=0, world_size=1, extra={}, out=first)
    assert other.tensors["float32-00000"].data_ptr() != places["float32-00000"], "another size needs other memory"
    again = pack(state, step=3, rank=0, world_size=1, extra={}, out=other)
    assert again.tensors["float32-00000"].data_ptr() == other.tensors["float32-00000"].data_ptr()
    assert PackedState([again]).read("w", "master", 0, 2).tolist() == [5, 6]


def test_a_part_survives_pickle_and_bytes() -> None:
    parts: list[Part] = pickle.loads(pickle.dumps(make_parts(2, 3)))
    rebuilt = [
        dataclasses.replace(
            part,
            index=json.loads(json.dumps(part.index)),
            tensors={
                name: torch.frombuffer(bytearray(tensor.view(torch.uint8).numpy().tobytes()), dtype=tensor.dtype)
                for name, tensor in part.tensors.items()
            },
        )
        for part in parts
    ]
    assert_holds(PackedState(rebuilt[::-1]), 2)


def test_elements_nobody_has_are_named() -> None:
    values = torch.arange(4.0)
    pieces = [Piece(name="w", kind="master", shape=(5, 4), start=start, values=values) for start in (0, 4, 12)]
    state = PackedState([pack(EngineState(pieces=pieces, facts={}), step=7, rank=0, world_size=1, extra={})])
    assert state.read("w", "master", 2, 8).tolist() == [2, 3, 0, 1, 2, 3]
    assert state.read("w", "master", 13, 15).tolist() == [1, 2]
    with pytest.raises(ArtifactError) as error:
        state.read("w", "master", 2, 16)
    assert str(error.value) == (
        "snapshot of step 7 (master of w: no elements 8 to 12 of 20) must hold every element that is read; check that "
        "model and optimizer are those it was written with."
    )
    with pytest.raises(ArtifactError, match=r"no elements 16 to 20 of 20"):
        state.read("w", "master", 12, 20)
    with pytest.raises(ArtifactError, match=r"exp_avg of w: no elements 0 to 4\)"):
        state.read("w", "exp_avg", 0, 4)
    assert not state.has("w", "exp_avg")


def drop(parts: list[Part]) -> list[Part]:
    return parts[1:]


def mix_steps(parts: list[Part]) -> list[Part]:
    return [parts[0], make_parts(8, 2)[1]]


def mix_facts(parts: list[Part]) -> list[Part]:
    assert isinstance(parts[1].index, dict)
    return [
        parts[0],
        dataclasses.replace(parts[1], index={**parts[1].index, "facts": {**facts_of(9), "loss_scale": 1}}),
    ]


def other_format(parts: list[Part]) -> list[Part]:
    assert isinstance(parts[1].index, dict)
    return [parts[0], dataclasses.replace(parts[1], index={**parts[1].index, "format": 99})]


def no_index(parts: list[Part]) -> list[Part]:
    return [parts[0], dataclasses.replace(parts[1], index={"format": 1})]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop, r"snapshot of step 9 \(parts of ranks \[1\]\) must be the parts of ranks 0 to 1 of one step; go on"),
        (mix_steps, r"\(step 8 of 2 ranks, step 9 of 2 ranks\) must be the parts of ranks 0 to 1 of one step; go on"),
        (mix_facts, r"\(facts or extra of ranks 0 and 1 differ\) must be parts of one state; go on from a checkpoint"),
        (other_format, r"part of rank 1 \(format 99\) must be of format 1; read it with the version of ray_ds that"),
        (no_index, r"part of rank 1 \(facts: Field required\) must hold a part's index; use another"),
    ],
)
def test_parts_of_different_states_are_refused(spoil: Callable[[list[Part]], list[Part]], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        PackedState(spoil(make_parts(9, 2)))


@pytest.mark.gpu
def test_pieces_on_a_gpu_are_copied_into_pinned_memory_that_is_used_again() -> None:
    values = torch.arange(1000.0, device="cuda")
    pieces = [Piece(name="w", kind="master", shape=(1000,), start=0, values=values)]
    state = EngineState(pieces=pieces, facts={})
    first = pack(state, step=1, rank=0, world_size=1, extra={})
    values += 1  # at once: what was packed is the state before
    first.wait()
    assert first.tensors["float32-00000"].is_pinned()
    assert torch.equal(first.tensors["float32-00000"], torch.arange(1000.0))
    second = pack(state, step=2, rank=0, world_size=1, extra={}, out=first)
    second.wait()
    assert second.tensors["float32-00000"].data_ptr() == first.tensors["float32-00000"].data_ptr()
    assert torch.equal(PackedState([second]).read("w", "master", 0, 1000), torch.arange(1000.0) + 1)
