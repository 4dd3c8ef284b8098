"""What predicting text costs a model: cross-entropy, perplexity, bits per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import Span, span_inputs, span_targets
from ray_ds.model.loss import IGNORED_TARGET


class LossModel(Protocol):
    """A causal language model; a `Decoder` is one."""

    def __call__(self, tokens: Tensor, *, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy in nats of `targets` (B, T) after `tokens` (B, T), -100 left out."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What predicting some text cost."""

    nats: float
    """Cross-entropy, summed over tokens."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the text that the tokens stand for."""

    @property
    def loss(self) -> float:
        """Return nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Return bits a byte of text, which can be compared between vocabularies."""
        return bits_per_byte(self.nats, self.bytes)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return nats / (ln 2 * bytes)."""
    return nats / (math.log(2) * num_bytes)


def micro_batches(spans: Sequence[Span], micro_batch: int) -> list[Sequence[Span]]:
    """Cut spans into runs of `micro_batch`, in order."""
    return [spans[i : i + micro_batch] for i in range(0, len(spans), micro_batch)]


def sum_loss(model: LossModel, split: TokenSplit, spans: Sequence[Span], device: str = "cpu") -> float:
    """Return the nats of the targets of one micro-batch of spans.

    Rows shorter than the longest are padded at their end, which a causal model does not see before it.
    """
    length = max(span.num_targets for span in spans)
    tokens = np.zeros((len(spans), length), np.int64)  # (B, T)
    targets = np.full((len(spans), length), IGNORED_TARGET, np.int64)  # (B, T)
    for row, span in enumerate(spans):
        tokens[row, : span.num_targets] = span_inputs(split, span)
        targets[row, : span.num_targets] = span_targets(split, span)
    with torch.inference_mode():
        nats = model(torch.from_numpy(tokens).to(device), targets=torch.from_numpy(targets).to(device))
    return float(nats)
