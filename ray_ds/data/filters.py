"""One default of quality and repetition rules, with thresholds for English and for Chinese.

The rules are Gopher's (arXiv 2112.11446, table A1) and FineWeb's (arXiv 2406.17557). Numbers for Chinese are those of
FineWeb-2's `cmn_Hani`, which count words of a segmenter; here a Chinese word is taken as 1.6 characters, so that no
segmenter is needed: an n-gram of 5 words becomes one of 8 characters. FineWeb-2's limits of repeated n-grams serve both
languages: Gopher's (0.15 to 0.10) drop 6 % of the King James chapters for their formulas, these 2 %. Left out is
Gopher's upper limit of words, which books exceed. The formula of each metric is in `metrics.py`.
"""

from dataclasses import dataclass

from ray_ds.config.clean import Language
from ray_ds.data.language import LanguageGuess
from ray_ds.data.metrics import Metrics, Tokenisation, measure

RULES = (
    "empty",
    "language",
    "too_short",
    "token_length",
    "symbols",
    "few_letters",
    "few_stop_words",
    "bullets",
    "ellipses",
    "unpunctuated_lines",
    "short_lines",
    "many_lines",
    "duplicate_lines",
    "duplicate_paragraphs",
    "top_ngrams",
    "duplicate_ngrams",
)
"""Reasons to drop a document, in the order in which they are looked at; bit i of a mask stands for the i-th."""
DUPLICATE = "duplicate"
"""The reason that needs all documents to be seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The thresholds of one language. A document that is exactly at a threshold is kept."""

    tokenisation: Tokenisation
    min_tokens: int
    mean_token_chars: tuple[float, float]
    min_letter_share: float
    stop_words: frozenset[str]
    min_punctuated_line_share: float
    max_short_line_share: float
    max_lines_per_token: float
    top_ngrams: tuple[tuple[int, float], ...]
    """(n, largest share of characters in the most frequent n-gram)."""
    duplicate_ngrams: tuple[tuple[int, float], ...]
    """(n, largest share of characters in repeated n-grams)."""
    max_symbol_share: float = 0.1
    min_stop_words: int = 2
    max_bullet_line_share: float = 0.9
    max_ellipsis_line_share: float = 0.3
    max_duplicate_line_share: float = 0.3
    max_duplicate_line_char_share: float = 0.2
    max_duplicate_paragraph_share: float = 0.3
    max_duplicate_paragraph_char_share: float = 0.2


PROFILES: dict[Language, Profile] = {
    "en": Profile(
        tokenisation="words",
        min_tokens=50,
        mean_token_chars=(3, 10),
        min_letter_share=0.75,
        stop_words=frozenset(["the", "be", "to", "of", "and", "that", "have", "with"]),
        min_punctuated_line_share=0.12,
        max_short_line_share=0.67,
        max_lines_per_token=0.3,
        top_ngrams=((2, 0.20), (3, 0.18), (4, 0.16)),
        duplicate_ngrams=((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.140), (10, 0.127)),
    ),
    "zh": Profile(
        tokenisation="characters",
        min_tokens=80,
        mean_token_chars=(1, 3),
        min_letter_share=0.70,
        stop_words=frozenset("的一是在不了有和人这這中为為上个個也而之其以所于於者"),
        min_punctuated_line_share=0.106,
        max_short_line_share=1.0,  # a full Chinese line often has less than 30 characters
        max_lines_per_token=0.111,
        top_ngrams=((3, 0.256), (5, 0.201), (6, 0.171)),
        duplicate_ngrams=((8, 0.198), (10, 0.182), (11, 0.167), (13, 0.154), (14, 0.140), (16, 0.127)),
    ),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of a document."""

    reason: str
    """The first rule that it breaks; empty for a document to keep."""
    mask: int
    """All rules that it breaks: bit i for `RULES[i]`."""


def judge(text: str, guess: LanguageGuess, *, languages: tuple[Language, ...], min_score: float) -> Verdict:
    """Return whether to keep a document. The rules of a language are tried only on text in that language."""
    if not text:
        return _verdict({"empty"})
    language = next((language for language in languages if language == guess.language), None)
    if language is None or guess.score < min_score:
        return _verdict({"language"})
    return _verdict(broken_rules(measure_for(text, PROFILES[language]), PROFILES[language]))


def measure_for(text: str, profile: Profile) -> Metrics:
    """Return the metrics that a language's thresholds apply to."""
    return measure(
        text,
        profile.tokenisation,
        stop_words=profile.stop_words,
        top_ngrams=tuple(n for n, _ in profile.top_ngrams),
        duplicate_ngrams=tuple(n for n, _ in profile.duplicate_ngrams),
    )


def broken_rules(metrics: Metrics, profile: Profile) -> set[str]:
    """Return the names of the rules that a document breaks."""
    shortest, longest = profile.mean_token_chars
    top_limits = [limit for _, limit in profile.top_ngrams]
    duplicate_limits = [limit for _, limit in profile.duplicate_ngrams]
    broken = {
        "too_short": metrics.num_tokens < profile.min_tokens,
        "token_length": not shortest <= metrics.mean_token_chars <= longest,
        "symbols": metrics.symbol_share > profile.max_symbol_share,
        "few_letters": metrics.letter_share < profile.min_letter_share,
        "few_stop_words": metrics.num_stop_words < profile.min_stop_words,
        "bullets": metrics.bullet_line_share > profile.max_bullet_line_share,
        "ellipses": metrics.ellipsis_line_share > profile.max_ellipsis_line_share,
        "unpunctuated_lines": metrics.punctuated_line_share < profile.min_punctuated_line_share,
        "short_lines": metrics.short_line_share > profile.max_short_line_share,
        "many_lines": metrics.lines_per_token > profile.max_lines_per_token,
        "duplicate_lines": metrics.duplicate_line_share > profile.max_duplicate_line_share
        or metrics.duplicate_line_char_share > profile.max_duplicate_line_char_share,
        "duplicate_paragraphs": metrics.duplicate_paragraph_share > profile.max_duplicate_paragraph_share
        or metrics.duplicate_paragraph_char_share > profile.max_duplicate_paragraph_char_share,
        "top_ngrams": _any_above(metrics.top_ngram_shares, top_limits),
        "duplicate_ngrams": _any_above(metrics.duplicate_ngram_shares, duplicate_limits),
    }
    return {name for name, is_broken in broken.items() if is_broken}


def _any_above(shares: tuple[float, ...], limits: list[float]) -> bool:
    return any(share > limit for share, limit in zip(shares, limits, strict=True))


def _verdict(broken: set[str]) -> Verdict:
    positions = [position for position, name in enumerate(RULES) if name in broken]
    return Verdict(RULES[positions[0]] if positions else "", sum(1 << position for position in positions))
