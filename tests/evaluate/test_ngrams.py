"""Unigram and bigram against counting by hand and a general-purpose optimizer."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ray_ds.data.shard_file import write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.ngrams import HELD_OUT_EVERY, Bigram, Counts, bigram_nats, fit_bigram
from ray_ds.evaluate.spans import plan_spans


def markov_stream(seed: int, length: int, vocab_size: int) -> np.ndarray:
    """Return tokens of which each has a few likely followers, with frequencies as uneven as words'."""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(99).zipf(1.5, (vocab_size, 8)) % vocab_size
    stream = [0]
    for jump, choice, anything in zip(
        rng.random(length), rng.integers(0, 8, length), rng.zipf(1.3, length) % vocab_size, strict=True
    ):
        stream.append(int(anything if jump < 0.3 else followers[stream[-1], choice]))
    return np.array(stream, np.uint32)


def open_split(folder: Path, split: str, streams: list[np.ndarray]) -> TokenSplit:
    for i, stream in enumerate(streams):
        write_shard(str(folder / f"{split}/{i}.arrow"), [stream], ["a"], np.uint32)
    return TokenSplit.open(str(folder), split)  # type: ignore[arg-type]


class SlowBigram:
    """The same model from dictionaries, weights given."""

    def __init__(self, pairs: list[tuple[int, int]], vocab_size: int) -> None:
        self.pairs, self.contexts = Counter(pairs), Counter(a for a, _ in pairs)
        self.tokens, self.total, self.vocab_size = Counter(b for _, b in pairs), len(pairs), vocab_size

    def unigram(self, b: int, weight: float) -> float:
        return weight * self.tokens[b] / self.total + (1 - weight) / self.vocab_size

    def bigram(self, a: int, b: int, weight: float, unigram_weight: float) -> float:
        seen = self.contexts[a]
        own = weight if seen else 0.0
        return own * (self.pairs[a, b] / seen if seen else 0.0) + (1 - own) * self.unigram(b, unigram_weight)

    def bucket(self, a: int) -> int:
        return self.contexts[a].bit_length()


@pytest.mark.parametrize("vocab_size", [13, 300, 1 << 20])
def test_frequencies_equal_dictionaries(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    ids = rng.integers(0, vocab_size, 40)
    contexts, targets = ids[rng.integers(0, 40, 3000)], ids[rng.integers(0, 40, 3000)]
    counts = Counts.of(contexts, targets, vocab_size)
    slow = SlowBigram(list(zip(contexts.tolist(), targets.tolist(), strict=True)), vocab_size)
    asked = rng.permutation(np.concatenate([ids, rng.integers(0, vocab_size, 40)]))
    before, after = np.repeat(asked, 80), np.tile(asked, 80)
    expected = [
        slow.bigram(int(a), int(b), 1.0, 0.0) if slow.contexts[a] else 0.0 for a, b in zip(before, after, strict=True)
    ]
    assert counts.bigram(before, after).tolist() == expected
    assert counts.unigram(after).tolist() == [slow.tokens[b] / 3000 for b in after]
    assert counts.bucket(before).tolist() == [slow.bucket(a) for a in before]


@pytest.mark.shows("The bigram beside a model's loss equals a slow reference with weights found by scipy")
def test_weights_and_cost_equal_a_slow_reference(tmp_path: Path) -> None:
    vocab_size = 200
    train = open_split(tmp_path, "train", [markov_stream(i, 6000, vocab_size) for i in range(2)])
    validation = open_split(tmp_path, "validation", [markov_stream(7, 2000, vocab_size)])
    model = fit_bigram(train, vocab_size, 10**9)

    block = train.num_tokens // (2 * HELD_OUT_EVERY)
    blocks = [stream[i : i + block + 1] for stream in map(train.shard_tokens, range(2)) for i in range(0, 6000, block)]
    pairs = [list(zip(part[:-1].tolist(), part[1:].tolist(), strict=True)) for part in blocks]
    slow = SlowBigram([pair for i, part in enumerate(pairs) if i % 10 != 9 for pair in part], vocab_size)
    held_out = [pair for part in pairs[9::10] for pair in part]

    def prior(w: float) -> float:
        return 0.5 * math.log(w) + 0.5 * math.log(1 - w)

    mu = minimize_scalar(
        lambda w: -sum(math.log(slow.unigram(b, w)) for _, b in held_out) - prior(w), bounds=(0, 1), method="bounded"
    ).x
    assert model.unigram_weight == pytest.approx(mu, abs=2e-3)
    for bucket in {slow.bucket(a) for a, _ in held_out} - {0}:
        own = [(a, b) for a, b in held_out if slow.bucket(a) == bucket]
        weight = minimize_scalar(
            lambda w, own=own: -sum(math.log(slow.bigram(a, b, w, mu)) for a, b in own) - prior(w),
            bounds=(0, 1),
            method="bounded",
        ).x
        assert model.bigram_weights[bucket] == pytest.approx(weight, abs=5e-3)

    full = SlowBigram([pair for part in pairs for pair in part], vocab_size)
    stream = validation.shard_tokens(0).tolist()
    weights = [float(w) for w in model.bigram_weights]
    expected = [
        -sum(math.log(full.unigram(b, model.unigram_weight)) for b in stream[1:]),
        -sum(math.log(full.bigram(a, b, weights[full.bucket(a)], model.unigram_weight)) for a, b in pairwise(stream)),
    ]
    found = bigram_nats(model, validation, plan_spans(validation, 64))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[1] < 0.9 * found[0] < 0.9 * (len(stream) - 1) * math.log(vocab_size)


def test_probabilities_sum_to_one_for_every_context(tmp_path: Path) -> None:
    vocab_size = 60
    stream = markov_stream(1, 3000, vocab_size - 5)  # five tokens never occur
    model: Bigram = fit_bigram(open_split(tmp_path, "train", [stream]), vocab_size, 10**9)
    everything = np.arange(vocab_size)
    assert model.unigram(everything).sum() == pytest.approx(1)
    for context in range(vocab_size):
        found = model.bigram(np.full(vocab_size, context), everything)
        assert found.min() > 0 and found.sum() == pytest.approx(1)


def test_tokens_that_training_never_shows_are_possible(tmp_path: Path) -> None:
    """Held-out blocks that hold nothing new must not make what is new in validation infinitely expensive."""
    train = open_split(tmp_path, "train", [np.tile(np.arange(4, dtype=np.uint32), 5000)])
    validation = open_split(tmp_path, "validation", [np.array([0, 1, 9, 9, 2], np.uint32)])
    unigram, bigram = bigram_nats(fit_bigram(train, 10, 10**9), validation, plan_spans(validation, 8))
    assert math.isfinite(unigram) and math.isfinite(bigram)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_almost_no_training_text_still_gives_a_model(tmp_path: Path, length: int) -> None:
    train = open_split(tmp_path, "train", [np.zeros(length, np.uint32)])
    model = fit_bigram(train, 5, 10**9)
    assert model.unigram(np.arange(5)).sum() == pytest.approx(1)
