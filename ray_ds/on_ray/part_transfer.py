"""Moving a part of a snapshot from a training process into keepers' memory and back."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
import xxhash
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from ray_ds.on_ray.keeper import Bytes, PartHeader, PartKey, TensorPlace, is_intact
from ray_ds.train.host import Part

CHUNK_BYTES = 4 << 20
"""What travels at once; Ray's object store holds it on the sender's and the keeper's node meanwhile."""
WINDOW = 4
"""Chunks of a process on their way at a time."""
MOVE_TIMEOUT_S = 30.0
"""Patience with a chunk that travels."""


def send_part(part: Part, key: PartKey, takers: Iterable[Any], *, copies: int) -> int:
    """Send a part to the first `copies` keepers that take it; return how many have it now."""
    part.wait()
    arrays = {name: tensor.view(torch.uint8).numpy() for name, tensor in part.tensors.items()}
    header = PartHeader(key=key, index=part.index, places=_place(part.tensors, arrays))
    willing: list[Any] = []
    for keeper in takers:
        if len(willing) < copies and answer(keeper.begin.remote(header)):
            willing.append(keeper)
    if not willing:
        return 0
    pending: list[list[Any]] = []
    for start, pieces in _chunks(list(arrays.values())):
        chunk = ray.put(pieces)
        pending.append([keeper.add.remote(key, start, chunk) for keeper in willing])
        if len(pending) >= WINDOW:
            _settle(pending.pop(0))
    for arrivals in pending:
        _settle(arrivals)
    return sum(bool(answer(arrival)) for arrival in [keeper.finish.remote(key) for keeper in willing])


def _place(tensors: Mapping[str, Tensor], arrays: Mapping[str, Bytes]) -> dict[str, TensorPlace]:
    """Lay tensors one behind the other."""
    places, start = {}, 0
    for name, array in arrays.items():
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        stop = start + array.nbytes
        places[name] = TensorPlace(dtype=dtype, start=start, stop=stop, xxh3=xxhash.xxh3_64_intdigest(array.data))
        start = stop
    return places


def _chunks(arrays: Sequence[Bytes]) -> Iterator[tuple[int, list[Bytes]]]:
    """Yield (where it starts, pieces) of chunks of at most `CHUNK_BYTES`, small arrays together, large ones cut."""
    start, size, pieces = 0, 0, []
    for array in arrays:
        offset = 0
        while offset < array.nbytes:
            piece = array[offset : offset + CHUNK_BYTES - size]
            pieces.append(piece)
            offset += piece.nbytes
            size += piece.nbytes
            if size == CHUNK_BYTES:
                yield start, pieces
                start, size, pieces = start + size, 0, []
    if pieces:
        yield start, pieces


def _settle(arrivals: list[Any]) -> None:
    """Wait until keepers have copied a chunk; one that does not is left to `finish`, which it will not pass either."""
    ray.wait(arrivals, num_returns=len(arrivals), timeout=MOVE_TIMEOUT_S, fetch_local=False)


def answer(result: Any) -> Any:
    """Return what a keeper answers; None where it is gone or silent."""
    try:
        return ray.get(result, timeout=MOVE_TIMEOUT_S)
    except (RayError, GetTimeoutError):
        return None


class _FetchedTensors(Mapping[str, Tensor]):
    """A part's tensors, each of which travels when it is first looked up."""

    def __init__(self, header: PartHeader, holders: Sequence[Any]) -> None:
        self._header, self._holders = header, holders
        self._here: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Tensor:
        place = self._header.places[name]
        with self._lock:
            if name not in self._here:
                self._here[name] = self._fetch(name, place)
            return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.places)

    def __len__(self) -> int:
        return len(self._header.places)

    def _fetch(self, name: str, place: TensorPlace) -> Tensor:
        """Return a tensor from the first keeper that has it undamaged."""
        dtype: torch.dtype = getattr(torch, place.dtype)
        tensor = torch.empty((place.stop - place.start) // dtype.itemsize, dtype=dtype)
        data: Bytes = tensor.view(torch.uint8).numpy()
        for keeper in self._holders:
            if _read(keeper, self._header.key, place, data) and is_intact(data, place):
                return tensor
        key = self._header.key
        raise LookupError(f"{name} of rank {key.rank} at step {key.step} is no longer in the memory of the nodes")


def open_part(key: PartKey, holders: Sequence[Any]) -> Part:
    """Return a part whose tensors have yet to travel.

    Raises:
        LookupError: no keeper has it any more.
    """
    for keeper in holders:
        header: PartHeader | None = answer(keeper.header.remote(key))
        if header is not None:
            tensors = _FetchedTensors(header, holders)
            return Part(step=key.step, rank=key.rank, world_size=key.world_size, index=header.index, tensors=tensors)
    raise LookupError(f"the part of rank {key.rank} at step {key.step} is no longer in the memory of the nodes")


def _read(keeper: Any, key: PartKey, place: TensorPlace, data: Bytes) -> bool:
    """Copy a tensor's bytes into `data`; tell whether the keeper has them still."""
    starts = range(place.start, place.stop, CHUNK_BYTES)
    asked: list[Any] = []
    for number, start in enumerate(starts):
        for ahead in starts[len(asked) : number + WINDOW]:
            asked.append(keeper.read.remote(key, ahead, min(ahead + CHUNK_BYTES, place.stop)))
        chunk: Bytes | None = answer(asked[number])
        asked[number] = None  # so that the object store can drop it
        if chunk is None:
            return False
        data[start - place.start : start - place.start + chunk.nbytes] = chunk
    return True
