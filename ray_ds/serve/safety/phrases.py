"""Harm and jailbreaks in plain words: a sentence that joins an act and its object, or has a phrase that says it alone.

A rule holds within one sentence: its parts in order with a few words between them, or all of them in any order. That
finds the wordings that the rules were made with, in English and a little Chinese, and few others: of sentences written
afterwards in other words, 3 of 24 for harm and 4 of 14 for jailbreaks (`jobs/bench/safety.py`). It keeps plain misuse
out at no cost; where more is needed, a model of your own goes in by `safety.detector`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ray_ds.serve.safety.finding import Finding

_SENTENCE = re.compile(r"[^.!?\n。！？]+")
_MAX_SENTENCE = 600
"""Characters; longer ones are looked at piece by piece, which overlap by half."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """The rules of one category."""

    category: str
    patterns: tuple[re.Pattern[str], ...]
    signals: re.Pattern[str]
    """The telling words: one of them is in all that the patterns find. From the first of them on, a sentence is held
    back until it ends, so that a stream of ordinary text is not delayed."""
    exceptions: re.Pattern[str]
    """What makes a sentence innocent: whoever asks how to prevent or recognise a thing does not ask how to do it."""


class PhraseDetector:
    """Finds sentences that the rules of a category mean."""

    def __init__(self, phrases: Phrases) -> None:
        self._phrases = phrases

    def find(self, text: str) -> list[Finding]:
        """Return the stretches that the rules mean."""
        findings = []
        for start, sentence in _sentences(text):
            if not self._phrases.signals.search(sentence) or self._phrases.exceptions.search(sentence):
                continue
            for pattern in self._phrases.patterns:
                match = pattern.search(sentence)
                if match is not None:
                    begin, end = start + match.start(), start + match.end()
                    findings.append(Finding(category=self._phrases.category, start=begin, end=end))
        return findings

    def undecided(self, text: str) -> int:
        """Return the start of the first signal in an unfinished sentence, or of the last word, which may become one."""
        start = max((text.rfind(end) for end in ".!?\n。！？"), default=-1) + 1
        start = max(start, len(text) - _MAX_SENTENCE)
        signal = self._phrases.signals.search(text, start)
        if signal is not None:
            return signal.start()
        word = re.search(r"[\w'-]{1,40}\Z", text)
        return len(text) if word is None else max(word.start(), start)


def _sentences(text: str) -> Sequence[tuple[int, str]]:
    """Return (start, sentence)."""
    found = []
    for match in _SENTENCE.finditer(text):
        for at in range(0, len(match[0]), _MAX_SENTENCE // 2):
            found.append((match.start() + at, match[0][at : at + _MAX_SENTENCE]))
            if at + _MAX_SENTENCE >= len(match[0]):
                break
    return found


def joined(*parts: str, words_between: int = 6) -> re.Pattern[str]:
    """Return a pattern of whole words or phrases in this order, with at most so many words between two of them."""
    gap = rf"\W+(?:\w+\W+){{0,{words_between}}}"
    return re.compile(gap.join(rf"\b(?:{part})\b" for part in parts), re.IGNORECASE)


def together(*parts: str) -> re.Pattern[str]:
    """Return a pattern of a whole sentence that has whole words or phrases of all parts, in any order."""
    return re.compile("\\A" + "".join(rf"(?=.*\b(?:{part})\b)" for part in parts) + ".*", re.IGNORECASE)


def exactly(pattern: str) -> re.Pattern[str]:
    """Return a pattern as it is written, whatever its case."""
    return re.compile(pattern, re.IGNORECASE)
