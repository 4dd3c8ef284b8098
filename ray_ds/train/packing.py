"""State packed into plain memory: large tensors, and an index that says what lies where in them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.errors import ArtifactError
from ray_ds.train.catalog import FORMAT, Catalog, Found, Run, decode_index, encode_run
from ray_ds.train.host import Part
from ray_ds.train.state import EngineState, Kind, Piece, Stretch

TENSOR_BYTES = 32 << 20
"""Largest tensor of a part; a piece that does not fit goes on in the next.

A process that goes on from parts in other nodes' memory fetches whole tensors, so smaller ones spare it more of what it
has no use for; each costs a copy to itself."""


def pack(
    state: EngineState,
    *,
    step: int,
    rank: int,
    world_size: int,
    extra: Mapping[str, JsonValue],
    own: Mapping[str, JsonValue] | None = None,
    out: Part | None = None,
) -> Part:
    """Copy a process's state into CPU memory.

    A GPU with as much memory free as the state takes only copies it there, which takes milliseconds a gigabyte, and
    sends the copy to the CPU while it goes on computing; `Part.wait` tells when that is done.

    Args:
        state: read before this returns; the next step may change it then.
        step: optimizer steps done.
        rank: of this process.
        world_size: parts that make a whole.
        extra: JSON to keep beside the state, the same on all ranks.
        own: JSON to keep for this rank alone.
        out: an earlier part whose memory may be overwritten; nobody may still read it, neither a `CheckpointWriter`
            that is `writing` it nor a store it was put into.
    """
    runs, sizes = _lay_out(state.pieces)
    on_gpu = any(piece.values.is_cuda for piece in state.pieces)
    earlier = out.tensors if out is not None else {}
    tensors = {name: _memory(earlier.get(name), *size, pinned=on_gpu) for name, size in sizes.items()}
    copies = [
        (tensors[run.tensor][run.offset : run.offset + run.numel], piece.values.detach()[first : first + run.numel])
        for piece, run, first in runs
    ]
    copied = _copy_from_gpu(copies) if on_gpu else None
    if not on_gpu:
        for target, source in copies:
            target.copy_(source)
    index: dict[str, JsonValue] = {
        "format": FORMAT,
        "facts": dict(state.facts),
        "extra": dict(extra),
        "own": dict(own or {}),
        "runs": [encode_run(run) for _, run, _ in runs],
    }
    return Part(step=step, rank=rank, world_size=world_size, index=index, tensors=tensors, copied=copied)


def _copy_from_gpu(copies: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
    """Copy tensors of one GPU to pinned memory; return what tells when they are there, or None where they are."""
    device = next(source.device for _, source in copies if source.is_cuda)
    needed = sum(source.nbytes for _, source in copies)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.mem_get_info(device)[0] + cached // 2 < needed:
        for target, source in copies:
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
        return None
    staged = [(target, source.clone()) for target, source in copies]
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream(device))
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(beside):
        for target, source in staged:
            target.copy_(source, non_blocking=True)
            if source.is_cuda:
                source.record_stream(beside)
        copied.record(beside)
    return copied


def _lay_out(pieces: Sequence[Piece]) -> tuple[list[tuple[Piece, Run, int]], dict[str, tuple[int, torch.dtype]]]:
    """Return each piece's runs with the element of the piece they begin at, and the tensors' lengths and types."""
    runs: list[tuple[Piece, Run, int]] = []
    sizes: dict[str, tuple[int, torch.dtype]] = {}
    filled: dict[torch.dtype, int] = {}
    for piece in pieces:
        assert piece.values.dim() == 1, f"{piece.name}: a piece is 1-D"
        dtype, numel = piece.values.dtype, piece.values.numel()
        dtype_name = str(dtype).removeprefix("torch.")
        limit = TENSOR_BYTES // dtype.itemsize
        first = 0
        while first < numel:
            number, offset = divmod(filled.get(dtype, 0), limit)
            count = min(numel - first, limit - offset)
            tensor = f"{dtype_name}-{number:05d}"
            run = Run(
                name=piece.name,
                kind=piece.kind,
                shape=tuple(piece.shape),
                start=piece.start + first,
                numel=count,
                dtype=dtype_name,
                tensor=tensor,
                offset=offset,
            )
            runs.append((piece, run, first))
            sizes[tensor] = (offset + count, dtype)
            filled[dtype] = filled.get(dtype, 0) + count
            first += count
    return runs, sizes


def _memory(earlier: Tensor | None, numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Return memory for a tensor: the earlier one's if that fits."""
    if earlier is not None and (earlier.numel(), earlier.dtype) == (numel, dtype) and earlier.is_pinned() == pinned:
        return earlier
    return torch.empty(numel, dtype=dtype, pin_memory=pinned)


class PackedState:
    """A whole state in memory; a `StateReader`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Take all parts of one state, in any order.

        Raises:
            ArtifactError: they are not all parts of one state.
        """
        assert parts, "a state has at least one part"
        first = parts[0]
        place = f"snapshot of step {first.step}"
        _check_whole(parts, place)
        indexes = [decode_index(part.index, f"{place}, part of rank {part.rank}") for part in parts]
        for part, index in zip(parts, indexes, strict=True):
            if (index.facts, index.extra) != (indexes[0].facts, indexes[0].extra):
                value = f"facts or extra of ranks {first.rank} and {part.rank} differ"
                raise ArtifactError(place, value, "must be parts of one state", "go on from a checkpoint instead")
        self._own = {part.rank: index.own for part, index in zip(parts, indexes, strict=True)}
        self._index = indexes[0]
        self._place = place
        self._catalog: Catalog[Part] = Catalog(place)
        for part, index in zip(parts, indexes, strict=True):
            self._catalog.add(index, part)

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        """What `EngineState.facts` was."""
        return self._index.facts

    @property
    def extra(self) -> Mapping[str, JsonValue]:
        """What the loop gave to `pack`."""
        return self._index.extra

    def own(self, rank: int) -> Mapping[str, JsonValue]:
        """Return what the loop gave to `pack` for a rank alone; empty for a rank that was not there then."""
        return self._own.get(rank, {})

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether the state has a tensor."""
        return self._catalog.has(name, kind)

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return a copy of elements of a flattened tensor, 1-D on the CPU in the type they were packed.

        Raises:
            ArtifactError: the pieces do not cover them.
        """
        return self._catalog.read(Stretch(name=name, kind=kind, start=start, stop=stop), self._fetch)

    def bring(self, wanted: Iterable[Stretch]) -> None:
        """Look up all that will be read, and no more: a part's tensors may lie elsewhere and travel when looked up.

        Args:
            wanted: tensors that the state does not have are passed over.
        Raises:
            ArtifactError: the pieces do not cover it.
            LookupError: it is no longer where it lay.
        """
        for stretch in wanted:
            if self.has(stretch.name, stretch.kind):
                for found in self._catalog.find(stretch):
                    self._tensor(found)

    def _tensor(self, found: Found[Part]) -> Tensor:
        """Return the tensor of a part that elements lie in."""
        part, run = found.part, found.run
        tensor = part.tensors.get(run.tensor)
        if tensor is None or str(tensor.dtype) != f"torch.{run.dtype}" or tensor.numel() < run.offset + run.numel:
            value = f"{run.kind} of {run.name}: {run.tensor} of rank {part.rank} lacks or is too short"
            raise ArtifactError(self._place, value, "must hold what its index says", "go on from a checkpoint instead")
        return tensor

    def _fetch(self, found: Found[Part], target: Tensor) -> None:
        begin = found.run.offset + found.first
        target.copy_(self._tensor(found)[begin : begin + found.count])


def _check_whole(parts: Sequence[Part], place: str) -> None:
    """Refuse parts that are not all parts of one state."""
    first = parts[0]
    if any((part.step, part.world_size) != (first.step, first.world_size) for part in parts):
        value = ", ".join(sorted({f"step {part.step} of {part.world_size} ranks" for part in parts}))
    elif sorted(part.rank for part in parts) != list(range(first.world_size)):
        value = f"parts of ranks {sorted(part.rank for part in parts)}"
    else:
        return
    allowed = f"must be the parts of ranks 0 to {first.world_size - 1} of one step"
    raise ArtifactError(place, value, allowed, "go on from a checkpoint instead")
