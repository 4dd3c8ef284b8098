"""Measure a document once: counts of words, lines and repetition that the rules of quality look at."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tokenisation = Literal["words", "characters"]

MAX_MEASURED_CHARS = 1_000_000
"""Of a longer document the beginning is measured, which bounds the workspace at about 50 MB."""
SHORT_LINE_CHARS = 30
TERMINAL_PUNCTUATION = frozenset(".!?\"'”’…;:)]}。！？；：」』）》】")
"""What a finished line ends in. Colons and brackets count: lists and citations are prose too."""
_CHARACTER = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]|[^\W\u3400-\u9fff]+")
_BULLETS = ("•", "-", "*", "·", "●")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What the rules need to know of a document. Shares are between 0 and 1, and 0 where there is nothing to count."""

    num_tokens: int
    """Words, or for Chinese characters (a run of Latin letters or digits is one)."""
    mean_token_chars: float
    symbol_share: float
    """Tokens that hold # or an ellipsis, of all."""
    letter_share: float
    """Letters of all characters but white space."""
    num_stop_words: int
    """Different stop words that occur."""
    bullet_line_share: float
    ellipsis_line_share: float
    punctuated_line_share: float
    """Lines that end in terminal punctuation."""
    short_line_share: float
    """Lines of at most 30 characters."""
    lines_per_token: float
    duplicate_line_share: float
    duplicate_line_char_share: float
    duplicate_paragraph_share: float
    duplicate_paragraph_char_share: float
    top_ngram_shares: tuple[float, ...]
    """For each n asked for: characters of the most frequent n-gram, all its occurrences, of all tokens' characters."""
    duplicate_ngram_shares: tuple[float, ...]
    """For each n asked for: characters covered by later occurrences of an n-gram, each counted once, of all."""


def measure(
    text: str,
    tokenisation: Tokenisation,
    *,
    stop_words: frozenset[str],
    top_ngrams: tuple[int, ...],
    duplicate_ngrams: tuple[int, ...],
) -> Metrics:
    """Return the metrics of a text of any length, also of an empty one."""
    text = text[:MAX_MEASURED_CHARS]
    tokens = text.lower().split() if tokenisation == "words" else _CHARACTER.findall(text.lower())
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    paragraphs = [paragraph for paragraph in (part.strip() for part in text.split("\n\n")) if paragraph]
    num_tokens, num_lines = max(len(tokens), 1), max(len(lines), 1)
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in tokens], dtype=np.int64)
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    top, duplicate = ngram_shares(ids, lengths, top_ngrams, duplicate_ngrams)
    line_share, line_char_share = _duplicate_shares(lines)
    paragraph_share, paragraph_char_share = _duplicate_shares(paragraphs)
    num_visible = max(len(text) - sum(map(text.count, " \n\t\r\u3000")), 1)
    return Metrics(
        num_tokens=len(tokens),
        mean_token_chars=float(lengths.sum()) / num_tokens,
        symbol_share=sum("#" in token or "…" in token or "..." in token for token in tokens) / num_tokens,
        letter_share=min(sum(map(str.isalpha, text)) / num_visible, 1.0),
        num_stop_words=sum(word in vocabulary for word in stop_words),
        bullet_line_share=sum(line.startswith(_BULLETS) for line in lines) / num_lines,
        ellipsis_line_share=sum(line.endswith(_ELLIPSES) for line in lines) / num_lines,
        punctuated_line_share=sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / num_lines,
        short_line_share=sum(len(line) <= SHORT_LINE_CHARS for line in lines) / num_lines,
        lines_per_token=len(lines) / num_tokens,
        duplicate_line_share=line_share,
        duplicate_line_char_share=line_char_share,
        duplicate_paragraph_share=paragraph_share,
        duplicate_paragraph_char_share=paragraph_char_share,
        top_ngram_shares=top,
        duplicate_ngram_shares=duplicate,
    )


def _duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """Return which share of the parts, and of their characters, repeats an earlier part."""
    if not parts:
        return 0.0, 0.0
    later = [(part, count - 1) for part, count in Counter(parts).items() if count > 1]
    chars = sum(len(part) * count for part, count in later) / sum(map(len, parts))
    return sum(count for _, count in later) / len(parts), chars


def ngram_shares(
    ids: NDArray[np.int64], lengths: NDArray[np.int64], top: tuple[int, ...], duplicate: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the top and the duplicate n-gram shares of tokens given as integers.

    The n-grams of length n + 1 are numbered from pairs (number of the n-gram, next token), so that equal numbers mean
    equal n-grams: no hashes, no collisions, no strings.

    Args:
        ids: token numbers below the number of tokens, shape (T,).
        lengths: characters of each token, shape (T,).
        top: lengths n for the share of the most frequent n-gram.
        duplicate: lengths n for the share covered by repeated n-grams.
    """
    total = max(int(lengths.sum()), 1)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    shares: dict[int, tuple[float, float]] = {}
    numbers = ids
    for n in range(1, max((*top, *duplicate)) + 1):
        if len(ids) < n:
            break
        if n > 1:
            pairs = numbers[:-1] * len(ids) + ids[n - 1 :]
            numbers = np.unique(pairs, return_inverse=True)[1].reshape(-1)
        order = np.argsort(numbers, kind="stable")
        is_repeat = np.zeros(len(numbers), dtype=bool)
        is_repeat[order[1:]] = numbers[order[1:]] == numbers[order[:-1]]
        chars = ends[n:] - ends[:-n]
        shares[n] = (_top_share(numbers, chars) / total, _covered_chars(is_repeat, lengths, n) / total)
        if not is_repeat.any():
            break  # longer ones do not repeat either
    nothing = (0.0, 0.0)
    return tuple(shares.get(n, nothing)[0] for n in top), tuple(shares.get(n, nothing)[1] for n in duplicate)


def _top_share(numbers: NDArray[np.int64], chars: NDArray[np.int64]) -> int:
    """Return count times characters of the most frequent n-gram; the longest of those equally frequent."""
    counts = np.bincount(numbers)
    most = int(counts.max())
    if most < 2:
        return 0
    return most * int(chars[counts[numbers] == most].max())


def _covered_chars(is_repeat: NDArray[np.bool_], lengths: NDArray[np.int64], n: int) -> int:
    """Return how many characters lie in n-grams that start where `is_repeat` says."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    edges[: len(is_repeat)] += is_repeat
    edges[n : n + len(is_repeat)] -= is_repeat
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
