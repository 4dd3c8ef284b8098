"""How likely a model finds texts after a prompt.

A row of tokens that goes through the model answers for every continuation whose inputs begin it: a causal model does
not see what follows. So labels of one token cost one row together, and equal texts are computed once and come out
equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_ds.tokenizer import BpeTokenizer

Key = tuple[int, ...]
"""What a result is kept under; sorts in a fixed order."""

MAX_LOGITS = 1 << 28
"""Logits of one micro-batch, at most, where it has more than one row: 1 GiB in fp32."""


class LogitModel(Protocol):
    """A causal language model; a `Decoder` is one."""

    def __call__(self, tokens: Tensor, *, logit_positions: Tensor) -> Tensor:
        """Return fp32 logits (B, P, V) that follow the places (B, P) of the rows `tokens` (B, T)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """Tokens, of which those from `start` on are to be judged."""

    tokens: tuple[int, ...]
    start: int
    """At least 1: a model must be given something."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return what the model must see: all but the last token."""
        return self.tokens[:-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """What a model says of a continuation."""

    nats: float
    """The log-probability of its tokens, summed: 0 is certain, less is less likely."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Tokens that go through the model once, for all continuations whose inputs begin them."""

    inputs: tuple[int, ...]
    continuations: tuple[tuple[Key, Continuation], ...]
    """With the key that each one's result is kept under."""

    @property
    def first(self) -> int:
        """Return the first place whose logits are wanted."""
        return min(own.start for _, own in self.continuations) - 1


def encode_choices(
    tokenizer: BpeTokenizer, prompt: str, texts: Sequence[str], opening: Sequence[int] = ()
) -> list[Continuation]:
    """Return a prompt's continuations by each of some texts.

    Prompt and text are encoded as one, as they would be in training. What is judged begins at the first token in which
    any of the texts, or the prompt's end, makes a difference, so that a blank at the prompt's end, which tokens of
    words begin with, is judged with the text; it is the same place for all texts.

    Args:
        opening: tokens in front of the prompt; without them BOS, where the tokenizer puts it or nothing else is there.
    """
    alone, *wholes = tokenizer.encode_batch([prompt, *(prompt + text for text in texts)])
    shared = min(_shared_length(alone, whole) for whole in wholes)
    before = tuple(opening)
    if not before and (tokenizer.marks.adds_bos or not shared):
        before = (tokenizer.bos_id,)
    return [Continuation(tokens=(*before, *whole), start=len(before) + shared) for whole in wholes]


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def cut_left(continuations: Sequence[Continuation], seq_len: int, bos_id: int) -> list[Continuation] | None:
    """Return continuations of one prompt that fit a model that sees `seq_len` tokens: the prompt loses its beginning.

    BOS stays where it begins with it, and all lose equally much. None where a text alone is too long.
    """
    surplus = max(len(own.inputs) for own in continuations) - seq_len
    if surplus <= 0:
        return list(continuations)
    if any(own.start - surplus < 1 for own in continuations):
        return None
    kept = int(continuations[0].tokens[0] == bos_id)
    return [
        Continuation(tokens=own.tokens[:kept] + own.tokens[kept + surplus :], start=own.start - surplus)
        for own in continuations
    ]


def plan_rows(continuations: Mapping[Key, Continuation]) -> list[Row]:
    """Return the rows that answer for all continuations, longest first; equal arguments give equal rows."""
    rows: list[Row] = []
    served: list[tuple[Key, Continuation]] = []
    ordered = sorted(continuations.items(), key=lambda pair: (pair[1].inputs, pair[0]))
    for place, pair in enumerate(ordered):
        served.append(pair)
        inputs = pair[1].inputs
        # In sorted order whatever a row begins comes right behind it.
        if place + 1 < len(ordered) and ordered[place + 1][1].inputs[: len(inputs)] == inputs:
            continue
        rows.append(Row(inputs=inputs, continuations=tuple(served)))
        served = []
    return sorted(rows, key=lambda row: -len(row.inputs))


def cut_batches(rows: Sequence[Row], micro_batch: int, vocab_size: int) -> Iterator[Sequence[Row]]:
    """Yield runs of rows of about one length that go through the model together.

    Args:
        micro_batch: rows at most; fewer where their logits would be more than `MAX_LOGITS`.
    """
    batch: list[Row] = []
    for row in rows:
        num_logits = max(len(own.inputs) - own.first for own in [*batch, row]) * (len(batch) + 1) * vocab_size
        if batch and (len(batch) == micro_batch or num_logits > MAX_LOGITS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_rows(model: LogitModel, rows: Sequence[Row], device: str = "cpu") -> dict[Key, Likelihood]:
    """Return the likelihood of every continuation of some rows, by its key.

    Rows shorter than the longest are padded at their end, which a causal model does not see before it.
    """
    tokens, places, first = _as_arrays(rows)
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens).to(device), logit_positions=torch.from_numpy(places).to(device))
        log_sums = logits.logsumexp(dim=-1)  # (B, P)
        likeliest = logits.argmax(dim=-1)  # (B, P)
        nats: list[Tensor] = []
        is_greedy: list[Tensor] = []
        for i, row in enumerate(rows):
            for _, own in row.continuations:
                targets = torch.tensor(own.tokens[own.start :], device=logits.device)
                place = slice(own.start - 1 - first[i], len(own.inputs) - first[i])
                chosen = logits[i, place].gather(-1, targets[:, None])[:, 0]
                nats.append((chosen - log_sums[i, place]).double().sum())
                is_greedy.append((likeliest[i, place] == targets).all())
    keys = [key for row in rows for key, _ in row.continuations]
    found = zip(keys, torch.stack(nats).tolist(), torch.stack(is_greedy).tolist(), strict=True)
    return {key: Likelihood(nats=own, is_greedy=greedy) for key, own, greedy in found}


def _as_arrays(rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Return tokens (B, T), the places whose logits are wanted (B, P), and the first of each row's."""
    length = max(len(row.inputs) for row in rows)
    first = [row.first for row in rows]
    num_places = max(len(row.inputs) - start for row, start in zip(rows, first, strict=True))
    tokens = np.zeros((len(rows), length), np.int64)
    places = np.zeros((len(rows), num_places), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.inputs)] = row.inputs
        places[i] = np.minimum(np.arange(first[i], first[i] + num_places), length - 1)
    return tokens, places, first
