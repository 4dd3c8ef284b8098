"""N-gram shares against a slow, obvious reference."""

import random
from collections import Counter

import numpy as np
import pytest

from ray_ds.data.metrics import ngram_shares


def _slow(tokens: list[str], n: int) -> tuple[float, float]:
    total = sum(map(len, tokens))
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    longest = max((sum(map(len, gram)) for gram, count in counts.items() if count == most), default=0)
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start, gram in enumerate(grams):
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return (most * longest / total if most > 1 else 0.0), sum(len(tokens[i]) for i in covered) / total


@pytest.mark.parametrize("seed", range(30))
def test_shares_equal_the_reference(seed: int) -> None:
    chooser = random.Random(seed)
    tokens = chooser.choices(["a", "bb", "ccc", "dddd", "eeeee"][: chooser.randint(1, 5)], k=chooser.randint(1, 80))
    numbers = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    ids = np.array([numbers[token] for token in tokens], dtype=np.int64)
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    orders = tuple(range(2, 11))
    top, duplicate = ngram_shares(ids, lengths, orders, orders)
    for position, n in enumerate(orders):
        assert (top[position], duplicate[position]) == pytest.approx(_slow(tokens, n))
