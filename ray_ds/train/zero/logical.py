"""A DeepSpeed engine's state by logical parameter, read and written where it lies.

What DeepSpeed itself offers for this was seen to fail: its universal checkpoint gives all parameter groups the first
one's weight decay and all sub-groups one `step` tensor, knows no Muon and no change of stage;
`safe_get_full_optimizer_state` finds nothing in the second group. So hyper-parameters are never read, `step` is made
anew for each tensor, and the weights trained in are refreshed from the masters on all processes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ray_ds.train.parallel.cuts import Cut
from ray_ds.train.state import Kind, Piece, StateReader, Stretch
from ray_ds.train.zero.layout import FlatSpan, Layout, Trained
from ray_ds.train.zero.partitions import MOMENTUM_KEY, stage_of

ADAM_KINDS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


class LogicalState:
    """The state of a DeepSpeed engine as this process holds it."""

    def __init__(self, decoder: nn.Module, engine: Any, cuts: Mapping[str, Cut]) -> None:
        """Look at a `DeepSpeedEngine` that was just made, with ZeRO 0 to 3.

        Args:
            cuts: of the parameters that this process has a part of, by name; where there are any, one process of a
                group lists the others.
        """
        names = {parameter: name for name, parameter in decoder.named_parameters()}
        self._stage = stage_of(engine, names)
        lists_uncut = all(cut.place == 0 for cut in cuts.values())
        self._trained = [_of_wholes(trained, cuts, lists_uncut) for trained in self._stage.trained()]
        self._states: MutableMapping[Tensor, dict[str, Tensor]] = engine.basic_optimizer.state
        # torch's fused AdamW wants its step counts on the device, the plain one on the CPU.
        self._is_fused = any(group.get("fused") for group in engine.basic_optimizer.param_groups)
        persistent = decoder.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in decoder.named_buffers() if name in persistent}

    def pieces(self) -> list[Piece]:
        """Return views of all this process holds alone."""
        return [*self._trained_pieces(), *(self._buffer_pieces() if torch.distributed.get_rank() == 0 else ())]

    def _trained_pieces(self) -> Iterator[Piece]:
        for trained in self._trained:
            state = self._states.get(trained.master, {})
            yield from _cut("master", trained.layout.owned, trained.master)
            for kind in ADAM_KINDS:
                if kind in state:
                    yield from _cut(kind, trained.layout.owned, state[kind])
            if trained.momentum is not None and MOMENTUM_KEY in state:
                yield from _cut("momentum", trained.momentum.owned, state[MOMENTUM_KEY])

    def _buffer_pieces(self) -> Iterator[Piece]:
        for name, buffer in self._buffers.items():
            whole = FlatSpan(name=name, shape=tuple(buffer.shape), start=0, stop=buffer.numel(), offset=0)
            yield from _cut("buffer", [whole], buffer)

    def optimizer_steps(self) -> int:
        """Return how many steps changed the weights, by AdamW's own count; every optimizer has it for the norms."""
        counts = {int(state["step"]) for state in self._states.values() if "step" in state}
        assert len(counts) <= 1, f"all parameters step together, and yet: {counts}"
        return counts.pop() if counts else 0

    def needs(self) -> Iterator[Stretch]:
        """Yield all that `load` may read."""
        for trained in self._trained:
            moments: tuple[Kind, ...] = ADAM_KINDS if trained.momentum is None else ()
            for kind in ("master", *moments):
                yield from (stretch for stretch, _ in _stretches(kind, trained.layout.held))
            if trained.momentum is not None:
                yield from (stretch for stretch, _ in _stretches("momentum", trained.momentum.held))
        for name, buffer in self._buffers.items():
            yield Stretch(name=name, kind="buffer", start=0, stop=buffer.numel())

    @torch.no_grad()
    def load(self, reader: StateReader, *, optimizer_steps: int) -> None:
        """Take over a whole state; all processes call this together.

        Raises:
            ArtifactError: the state is not whole.
        """
        self._stage.open()
        for trained in self._trained:
            _fill("master", trained.layout.held, trained.master, reader)
            if trained.momentum is None:
                self._load_adam(trained, reader, optimizer_steps)
            else:
                self._load_momentum(trained, trained.momentum, reader, optimizer_steps)
        for name, buffer in self._buffers.items():
            buffer.view(-1).copy_(reader.read(name, "buffer", 0, buffer.numel()))
        self._stage.refresh()

    def _load_adam(self, trained: Trained, reader: StateReader, optimizer_steps: int) -> None:
        """Load AdamW's means, made where there are none yet; before the first step it has none."""
        if not optimizer_steps:
            self._states.pop(trained.master, None)
            return
        state = self._states.setdefault(trained.master, {})
        # One tensor for each: AdamW counts in place, so a shared one would count every tensor's step.
        device = trained.master.device if self._is_fused else torch.device("cpu")
        state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=device)
        for kind in ADAM_KINDS:
            if kind not in state:
                state[kind] = torch.zeros_like(trained.master)
            _fill(kind, trained.layout.held, state[kind], reader)

    def _load_momentum(self, trained: Trained, layout: Layout, reader: StateReader, optimizer_steps: int) -> None:
        """Load Muon's mean; before the first step it may be absent, which DeepSpeed takes for zeros."""
        if not layout.held:
            return
        if not optimizer_steps and not reader.has(layout.held[0].name, "momentum"):
            self._states.pop(trained.master, None)
            return
        state = self._states.setdefault(trained.master, {})
        if MOMENTUM_KEY not in state:
            made = torch.zeros(layout.shape, dtype=trained.momentum_dtype, device=trained.master.device)
            state[MOMENTUM_KEY] = made
        _fill("momentum", layout.held, state[MOMENTUM_KEY], reader)

    def settle(self) -> None:
        """Make it possible to look at any weight; all processes call this together."""
        self._stage.settle()

    def drop_gradients(self) -> None:
        """Forget the gradients gathered since the last step; all processes call this together."""
        self._stage.drop_gradients()


def _cut(kind: Kind, spans: Sequence[FlatSpan], flat: Tensor) -> Iterator[Piece]:
    for span in spans:
        yield Piece(name=span.name, kind=kind, shape=span.shape, start=span.start, values=span.within(flat))


def _stretches(kind: Kind, spans: Sequence[FlatSpan]) -> Iterator[tuple[Stretch, list[FlatSpan]]]:
    """Yield what is read at once, and the spans that it fills.

    Spans of a parameter that is cut may be many, so what lies between them is read too.
    """
    for name, of_one in groupby(spans, lambda span: span.name):
        parts = list(of_one)
        yield Stretch(name=name, kind=kind, start=parts[0].start, stop=parts[-1].stop), parts


def _fill(kind: Kind, spans: Sequence[FlatSpan], flat: Tensor, reader: StateReader) -> None:
    for stretch, parts in _stretches(kind, spans):
        read = reader.read(stretch.name, kind, stretch.start, stretch.stop)
        for span in parts:
            span.within(flat).copy_(read[span.start - stretch.start : span.stop - stretch.start])


def _of_wholes(trained: Trained, cuts: Mapping[str, Cut], lists_uncut: bool) -> Trained:
    """Return what is trained, its spans being of whole parameters instead of this process's parts of them."""
    if not cuts:
        return trained
    assert trained.momentum is None, "settings refuse Muon here"
    layout = trained.layout
    owned = [part for span in layout.owned for part in _whole_spans(span, cuts, lists_uncut=lists_uncut)]
    held = [part for span in layout.held for part in _whole_spans(span, cuts, lists_uncut=True)]
    return dataclasses.replace(trained, layout=dataclasses.replace(layout, owned=owned, held=held))


def _whole_spans(span: FlatSpan, cuts: Mapping[str, Cut], *, lists_uncut: bool) -> list[FlatSpan]:
    """Return a span of a part as spans of the whole, none where the parameter is whole and another process lists it."""
    cut = cuts.get(span.name)
    if cut is None:
        return [span] if lists_uncut else []
    found, offset, shape = [], span.offset, cut.whole_shape(span.shape)
    for start, length in cut.runs(span.shape, span.start, span.stop):
        found.append(FlatSpan(name=span.name, shape=shape, start=start, stop=start + length, offset=offset))
        offset += length
    return found
