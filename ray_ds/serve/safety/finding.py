"""What detectors find, and what a detector is."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A stretch of a text that belongs to a category."""

    category: str
    """`secret`, `payment`, `contact`, `harm`, `jailbreak`, or a word of your own detector."""
    start: int
    end: int
    """The characters `text[start:end]`."""


class Detector(Protocol):
    """Finds what it knows in a text. It is called from several threads and keeps nothing between calls."""

    def find(self, text: str) -> list[Finding]:
        """Return what is in the text, in any order."""

    def undecided(self, text: str) -> int:
        """Return where the end of the text starts that more text could turn into, or add to, a finding.

        Characters before that place are released to whoever reads the stream: `len(text)` where all of them may be.
        `text` may begin within the answer: it holds what is not yet released, and some hundred characters before that.
        """
