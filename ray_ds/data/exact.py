"""Exact duplicates over all work units: a key a document, and the first document of each key."""

import re
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

KEY_BYTES = 16
_SPACE = re.compile(r"\s+")

Keys = NDArray[np.void]
"""Keys in order of rows, dtype V16."""


def duplicate_key(text: str) -> bytes:
    """Return the xxh3-128 of the text with case folded and white space evened out."""
    return xxhash.xxh3_128_digest(_SPACE.sub(" ", text).strip().casefold().encode())


def unpack_keys(data: bytes) -> Keys:
    """Return keys that lie end to end as one array."""
    return np.frombuffer(data, dtype=f"V{KEY_BYTES}")


def find_duplicates(parts: Sequence[Keys]) -> list[NDArray[np.bool_]]:
    """Return for each part which rows have a key that an earlier part or row has.

    The first document of a key, by (part, row), stays, whatever the order in which parts were made. Takes about 50
    bytes of memory a document: 5 GB for a hundred million.
    """
    keys = np.concatenate([np.empty(0, dtype=f"V{KEY_BYTES}"), *parts])
    halves = keys.view("<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal keys stay in order of rows
    is_later = np.zeros(len(keys), dtype=bool)
    is_later[order[1:]] = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    borders = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(is_later, borders) if parts else []
