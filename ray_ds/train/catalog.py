"""Where the elements of logical tensors lie in the parts of a state: each part's index in JSON, and all of them joined.

A part's index is `{"format": 1, "facts": {...}, "extra": {...}, "own": {...}, "runs": [...]}`. Each run is a stretch
of a logical tensor: `numel` elements from `start` on of the flattened `name` (`kind`, whole `shape`), which lie from
element `offset` on in the part's tensor `tensor`.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import pydantic
import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.errors import ArtifactError
from ray_ds.train.state import Kind, Stretch

P = TypeVar("P")
"""What a part is to whoever asks the catalog."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a stretch of a logical tensor lies in a part; the module's docstring says what each field means."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    numel: int
    dtype: str
    tensor: str
    offset: int

    @property
    def stop(self) -> int:
        """Where the stretch ends in the logical tensor."""
        return self.start + self.numel


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A part's index, decoded."""

    format: int
    facts: dict[str, JsonValue]
    """As in `EngineState`, the same in all parts."""
    extra: dict[str, JsonValue]
    """What the loop added, the same in all parts: the cursor, the seed."""
    own: dict[str, JsonValue]
    """What the loop added for this rank alone: the state of its random numbers."""
    runs: tuple[Run, ...]


_INDEX = pydantic.TypeAdapter(Index)


def encode_run(run: Run) -> JsonValue:
    """Return a run as JSON; by hand, for this is part of what training waits for."""
    return {
        "name": run.name,
        "kind": run.kind,
        "shape": list(run.shape),
        "start": run.start,
        "numel": run.numel,
        "dtype": run.dtype,
        "tensor": run.tensor,
        "offset": run.offset,
    }


def decode_index(index: JsonValue, place: str) -> Index:
    """Return a part's index.

    Raises:
        ArtifactError: it is none, or of a format this version cannot read.
    """
    try:
        found = _INDEX.validate_python(index)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ArtifactError(place, f"{where}: {problem['msg']}", "must hold a part's index", "use another") from None
    if found.format != FORMAT:
        action = "read it with the version of ray_ds that wrote it"
        raise ArtifactError(place, f"format {found.format}", f"must be of format {FORMAT}", action)
    return found


@dataclass(frozen=True, slots=True)
class Found(Generic[P]):
    """Where some elements lie."""

    part: P
    run: Run
    first: int
    """The first of them in the run."""
    count: int


@dataclass(slots=True)
class _Runs(Generic[P]):
    """The runs of one logical tensor, in order of their start."""

    starts: list[int] = field(default_factory=list)
    runs: list[tuple[Run, P]] = field(default_factory=list)


class Catalog(Generic[P]):
    """Where the elements of each logical tensor lie, over all parts of a state."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._runs: dict[tuple[str, Kind], _Runs[P]] = {}

    def add(self, index: Index, part: P) -> None:
        """Take a part's runs in."""
        for run in index.runs:
            known = self._runs.setdefault((run.name, run.kind), _Runs())
            at = bisect.bisect(known.starts, run.start)
            known.starts.insert(at, run.start)
            known.runs.insert(at, (run, part))

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether any element of a tensor is there."""
        return (name, kind) in self._runs

    def find(self, wanted: Stretch) -> list[Found[P]]:
        """Return where the elements of a stretch lie, in their order, each once.

        Raises:
            ArtifactError: the runs do not cover them.
        """
        assert 0 <= wanted.start <= wanted.stop, f"{wanted} is no range"
        known = self._runs.get((wanted.name, wanted.kind))
        if known is None:
            raise self._missing(wanted)
        found: list[Found[P]] = []
        at = wanted.start
        for run, part in known.runs[max(0, bisect.bisect(known.starts, at) - 1) :]:
            if at >= wanted.stop or run.start > at:
                break
            end = min(wanted.stop, run.stop)
            if end > at:
                found.append(Found(part, run, at - run.start, end - at))
                at = end
        if at < wanted.stop:
            following = [begin for begin in known.starts if begin > at]
            raise self._missing(replace(wanted, start=at, stop=min([wanted.stop, *following])))
        return found

    def read(self, wanted: Stretch, fetch: Callable[[Found[P], Tensor], None]) -> Tensor:
        """Return the elements of a stretch from whatever runs hold them.

        Args:
            fetch: copies elements from where they lie into a tensor of as many.
        Raises:
            ArtifactError: the runs do not cover them.
        """
        found = self.find(wanted)
        dtype = self._runs[wanted.name, wanted.kind].runs[0][0].dtype
        result = torch.empty(wanted.stop - wanted.start, dtype=getattr(torch, dtype))
        at = 0
        for place in found:
            fetch(place, result[at : at + place.count])
            at += place.count
        return result

    def _missing(self, lacking: Stretch) -> ArtifactError:
        known = self._runs.get((lacking.name, lacking.kind))
        whole = f" of {math.prod(known.runs[0][0].shape)}" if known is not None else ""
        value = f"{lacking.kind} of {lacking.name}: no elements {lacking.start} to {lacking.stop}{whole}"
        allowed = "must hold every element that is read"
        return ArtifactError(
            self._place, value, allowed, "check that model and optimizer are those it was written with"
        )
