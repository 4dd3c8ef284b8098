"""Exact duplicates over parts."""

import random

import numpy as np

from ray_ds.data.exact import duplicate_key, find_duplicates, unpack_keys


def test_white_space_and_case_make_no_difference() -> None:
    assert duplicate_key("One  two\nthree ") == duplicate_key("one two Three")
    assert duplicate_key("one two") != duplicate_key("one too")


def test_the_first_of_a_key_stays() -> None:
    chooser = random.Random(0)
    texts = [[str(chooser.randint(0, 40)) for _ in range(chooser.randint(0, 30))] for _ in range(8)]
    found = find_duplicates([unpack_keys(b"".join(map(duplicate_key, part))) for part in texts])
    seen: set[str] = set()
    for part, mask in zip(texts, found, strict=True):
        assert len(part) == len(mask)
        for text, is_later in zip(part, mask, strict=True):
            assert bool(is_later) == (text in seen)
            seen.add(text)


def test_nothing_has_no_duplicates() -> None:
    assert find_duplicates([]) == []
    assert [mask.tolist() for mask in find_duplicates([np.empty(0, "V16")])] == [[]]
