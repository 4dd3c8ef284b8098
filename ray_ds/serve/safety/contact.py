"""E-mail addresses, IP addresses and phone numbers, by the rules that mask them in training data."""

import re

from ray_ds.data.pii import find_pii
from ray_ds.serve.safety.finding import Finding

CATEGORY = "contact"

_BEGINNINGS = re.compile(r"(?:[+(]?\d[\d ().-]{0,40}|[!-~]{1,320})\Z")
"""320 characters are the longest e-mail address (RFC 3696, erratum 1690)."""


class ContactDetector:
    """Finds addresses that reach a person or a machine."""

    def find(self, text: str) -> list[Finding]:
        """Return the addresses of a text."""
        return [Finding(category=CATEGORY, start=start, end=end) for start, end in find_pii(text)]

    def undecided(self, text: str) -> int:
        """Return the start of the last word, or of the digits that the text ends with."""
        match = _BEGINNINGS.search(text, max(0, len(text) - 400))
        return len(text) if match is None else match.start()
