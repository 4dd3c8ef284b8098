"""Which tokens are predicted, by every measure alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ds.data.shards import TokenSplit
from ray_ds.tokenizer import BpeTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens `start` to `stop` of a shard as inputs; each one's target is the token after it."""

    shard: int
    start: int
    stop: int

    @property
    def num_targets(self) -> int:
        """Return how many tokens are predicted."""
        return self.stop - self.start


def plan_spans(split: TokenSplit, seq_len: int, max_tokens: int | None = None) -> list[Span]:
    """Cut a split into spans of `seq_len` tokens, shorter at each shard's end, that have each target once.

    Only a shard's first token, a BOS, is no target. With `max_tokens`, as many spans as hold about that many tokens
    are kept, spread evenly.
    """
    spans = [
        Span(shard=shard, start=start, stop=min(start + seq_len, last))
        for shard, last in enumerate(len(split.shard_tokens(i)) - 1 for i in range(split.num_shards))
        for start in range(0, last, seq_len)
    ]
    wanted = len(spans) if max_tokens is None else min(-(-max_tokens // seq_len), len(spans))
    return [spans[i * len(spans) // wanted] for i in range(wanted)]


def span_inputs(split: TokenSplit, span: Span) -> NDArray[Any]:
    """Return a span's inputs, a view of the shard."""
    return split.shard_tokens(span.shard)[span.start : span.stop]


def span_targets(split: TokenSplit, span: Span) -> NDArray[Any]:
    """Return a span's targets, a view of the shard."""
    return split.shard_tokens(span.shard)[span.start + 1 : span.stop + 1]


def count_bytes(split: TokenSplit, spans: Sequence[Span], tokenizer: BpeTokenizer) -> int:
    """Return the bytes of text that the targets of spans stand for."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int64)
    return int(sum(lengths[span_targets(split, span)].sum() for span in spans))


def text_of(split: TokenSplit, spans: Sequence[Span], tokenizer: BpeTokenizer) -> bytes:
    """Return the text of the targets of spans, one after another."""
    return b"".join(tokenizer.decode_bytes(span_targets(split, span).tolist()) for span in spans)
