"""Where the elements of logical tensors lie in the parts of a state: each part's index in JSON, and all of them joined.

A part's index is `{"format": 1, "facts": {...}, "extra": {...}, "own": {...}, "runs": [...]}`. Each run is a stretch
of a logical tensor: `numel` elements from `start` on of the flattened `name` (`kind`, whole `shape`), which lie from
element `offset` on in the part's tensor `tensor`.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pydantic
import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.errors import ArtifactError
from ray_ds.train.state import Kind

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


Fetch = Callable[[Run, int, Tensor], None]
"""Copies elements of a run, from its so-manieth on, into a tensor."""


@dataclass(slots=True)
class _Runs:
    """The runs of one logical tensor, in order of their start."""

    starts: list[int] = field(default_factory=list)
    runs: list[tuple[Run, Fetch]] = field(default_factory=list)


class Catalog:
    """Where the elements of each logical tensor lie, over all parts of a state."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._found: dict[tuple[str, Kind], _Runs] = {}

    def add(self, index: Index, fetch: Fetch) -> None:
        """Take a part's runs in."""
        for run in index.runs:
            found = self._found.setdefault((run.name, run.kind), _Runs())
            at = bisect.bisect(found.starts, run.start)
            found.starts.insert(at, run.start)
            found.runs.insert(at, (run, fetch))

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether any element of a tensor is there."""
        return (name, kind) in self._found

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements of a logical tensor from whatever runs hold them.

        Raises:
            ArtifactError: the runs do not cover them.
        """
        assert 0 <= start <= stop, f"{name}: elements {start} to {stop} are no range"
        found = self._found.get((name, kind))
        if found is None:
            raise self._missing(name, kind, start, stop)
        result = torch.empty(stop - start, dtype=getattr(torch, found.runs[0][0].dtype))
        at = start
        for run, fetch in found.runs[max(0, bisect.bisect(found.starts, start) - 1) :]:
            if at >= stop or run.start > at:
                break
            end = min(stop, run.stop)
            if end > at:
                fetch(run, at - run.start, result[at - start : end - start])
                at = end
        if at < stop:
            following = [begin for begin in found.starts if begin > at]
            raise self._missing(name, kind, at, min([stop, *following]))
        return result

    def _missing(self, name: str, kind: Kind, start: int, stop: int) -> ArtifactError:
        found = self._found.get((name, kind))
        whole = f" of {math.prod(found.runs[0][0].shape)}" if found is not None else ""
        value = f"{kind} of {name}: no elements {start} to {stop}{whole}"
        allowed = "must hold every element that is read"
        return ArtifactError(
            self._place, value, allowed, "check that model and optimizer are those it was written with"
        )
