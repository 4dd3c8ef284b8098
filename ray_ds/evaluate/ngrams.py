"""Unigram and interpolated bigram: what a model must beat to have learned more than counts of neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import Span, plan_spans, span_inputs, span_targets

HELD_OUT_EVERY = 10
BLOCK_TOKENS = 4096
MAX_EM_ROUNDS = 200
EM_TOLERANCE = 1e-7

Ids = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often tokens, and pairs of neighbours, occur; pairs are sorted, so a large vocabulary costs no square."""

    vocab_size: int
    tokens: Ids
    """(V,) occurrences as a target."""
    contexts: Ids
    """(V,) occurrences as the token before a target."""
    pairs: NDArray[np.uint64]
    """context * V + target, ascending."""
    pair_counts: Ids

    @classmethod
    def of(cls, contexts: Ids, targets: Ids, vocab_size: int) -> "Counts":
        """Count aligned contexts and targets, (N,) each."""
        pairs, pair_counts = np.unique(_pair_keys(contexts, targets, vocab_size), return_counts=True)
        return cls(
            vocab_size=vocab_size,
            tokens=np.bincount(targets, minlength=vocab_size),
            contexts=np.bincount(contexts, minlength=vocab_size),
            pairs=pairs,
            pair_counts=pair_counts,
        )

    def unigram(self, targets: Ids) -> Probabilities:
        """Return c(w) / N of each target; 1 / V where nothing was counted."""
        total = int(self.tokens.sum())
        return self.tokens[targets] / total if total else np.full(len(targets), 1 / self.vocab_size)

    def bigram(self, contexts: Ids, targets: Ids) -> Probabilities:
        """Return c(v, w) / c(v) of each pair; 0 where the context was never seen."""
        keys = _pair_keys(contexts, targets, self.vocab_size)
        places = np.minimum(np.searchsorted(self.pairs, keys), max(len(self.pairs) - 1, 0))
        found = np.where(self.pairs[places] == keys, self.pair_counts[places], 0)
        return found / np.maximum(self.contexts[contexts], 1)

    def bucket(self, contexts: Ids) -> Ids:
        """Return each context's class of frequency: 0 = never seen, then 1 + floor(log2 c(v))."""
        return np.frexp(self.contexts[contexts].astype(np.float64))[1].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Bigram:
    """Jelinek-Mercer interpolation of bigram, unigram and uniform frequencies.

        P1(w)     = m c(w) / N + (1 - m) / V
        P2(w | v) = l(v) c(v, w) / c(v) + (1 - l(v)) P1(w)

    l(v) is one weight for all contexts with the same floor(log2 c(v)). The weights are those that make the held-out
    tenth of the training tokens likeliest, found by EM with counts of the other nine; the counts are then taken over
    all of them. EM has half a made-up observation on either side, so that no weight is 1 and no token impossible.
    Source: Jelinek and Mercer 1980; Chen and Goodman 1998, 2.3.
    """

    counts: Counts
    unigram_weight: float
    bigram_weights: Probabilities
    """(65,) by bucket."""

    def unigram(self, targets: Ids) -> Probabilities:
        """Return P1 of each target."""
        return self.unigram_weight * self.counts.unigram(targets) + (1 - self.unigram_weight) / self.counts.vocab_size

    def bigram(self, contexts: Ids, targets: Ids) -> Probabilities:
        """Return P2 of each target after its context."""
        weights = self.bigram_weights[self.counts.bucket(contexts)]
        return weights * self.counts.bigram(contexts, targets) + (1 - weights) * self.unigram(targets)


def fit_bigram(split: TokenSplit, vocab_size: int, max_tokens: int) -> Bigram:
    """Return the bigram of at most about `max_tokens` tokens of the training split, spread evenly over it."""
    block = max(1, min(BLOCK_TOKENS, split.num_tokens // (2 * HELD_OUT_EVERY)))
    spans = plan_spans(split, block, max_tokens)
    held_out = spans[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    rest = [span for i, span in enumerate(spans) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    counts = Counts.of(*gather(split, rest), vocab_size)
    contexts, targets = gather(split, held_out)
    everything = np.zeros(len(targets), np.int64)
    uniform = np.full(len(targets), 1 / vocab_size)
    unigram_weight = float(_fit_weights(counts.unigram(targets), uniform, everything, 1)[0])
    backoff = unigram_weight * counts.unigram(targets) + (1 - unigram_weight) * uniform
    bigram_weights = _fit_weights(counts.bigram(contexts, targets), backoff, counts.bucket(contexts), 65)
    bigram_weights[0] = 0.0  # a context never seen says nothing
    return Bigram(
        counts=Counts.of(*gather(split, spans), vocab_size),
        unigram_weight=unigram_weight,
        bigram_weights=bigram_weights,
    )


def gather(split: TokenSplit, spans: Sequence[Span]) -> tuple[Ids, Ids]:
    """Return the contexts and targets of spans, (N,) each."""
    nothing: list[NDArray[Any]] = [np.zeros(0, np.int64)]
    contexts = np.concatenate(nothing + [span_inputs(split, span) for span in spans])
    targets = np.concatenate(nothing + [span_targets(split, span) for span in spans])
    return contexts, targets


def _fit_weights(main: Probabilities, backoff: Probabilities, buckets: Ids, num_buckets: int) -> Probabilities:
    """Return the weight of `main` in each bucket under which the data is likeliest, by EM from 0.5.

    A bucket without data takes the weight of the one below: it holds contexts more frequent than any held out.
    """
    sizes = np.bincount(buckets, minlength=num_buckets)
    weights = np.full(num_buckets, 0.5)
    for _ in range(MAX_EM_ROUNDS):
        weight = weights[buckets]
        share = weight * main / (weight * main + (1 - weight) * backoff)
        updated = (np.bincount(buckets, share, num_buckets) + 0.5) / (sizes + 1)
        change = np.abs(updated - weights).max()
        weights = updated
        if change < EM_TOLERANCE:
            break
    for bucket in range(1, num_buckets):
        if not sizes[bucket]:
            weights[bucket] = weights[bucket - 1]
    return weights


def _pair_keys(contexts: Ids, targets: Ids, vocab_size: int) -> NDArray[np.uint64]:
    return contexts.astype(np.uint64) * np.uint64(vocab_size) + targets.astype(np.uint64)


def bigram_nats(model: Bigram, split: TokenSplit, spans: Sequence[Span]) -> tuple[float, float]:
    """Return what the targets of spans cost the unigram and the bigram, in nats."""
    contexts, targets = gather(split, spans)
    return float(-np.log(model.unigram(targets)).sum()), float(-np.log(model.bigram(contexts, targets)).sum())
