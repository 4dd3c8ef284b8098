"""Conditional xz: what held-out text costs a compressor that has the training text in its window."""

import lzma

MIN_DICT_BYTES = 1 << 12
MAX_DICT_BYTES = 1536 << 20
"""The limits of LZMA2's window (`man xz`, `dict=`)."""


def xz_bytes(text: bytes, window_bytes: int) -> int:
    """Return the length of `text` after `xz -9e` with a window of `window_bytes`."""
    window = min(max(window_bytes, MIN_DICT_BYTES), MAX_DICT_BYTES)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters))


def conditional_bits_per_byte(train_xz_bytes: int, both_xz_bytes: int, validation_bytes: int) -> float:
    """Return 8 (C(train + validation) - C(train)) / |validation|."""
    return 8 * (both_xz_bytes - train_xz_bytes) / validation_bytes
