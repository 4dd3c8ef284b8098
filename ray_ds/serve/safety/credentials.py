"""Secrets of machines and people: keys of well-known services, private keys, tokens and passwords given a name."""

import math
import re
from collections import Counter

from ray_ds.serve.safety.finding import Finding

CATEGORY = "secret"

_WORD_START = r"(?<![A-Za-z0-9_-])"
_KEYS = re.compile(
    _WORD_START
    + r"(?:"
    + "|".join(
        [
            r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # Amazon Web Services
            r"gh[pousr]_[A-Za-z0-9]{36,255}",  # GitHub
            r"github_pat_[A-Za-z0-9_]{60,255}",
            r"glpat-[A-Za-z0-9_-]{20,64}",  # GitLab
            r"xox[abeprs]-[A-Za-z0-9-]{10,250}",  # Slack
            r"AIza[A-Za-z0-9_-]{35}",  # Google
            r"sk-[A-Za-z0-9_-]{20,250}",  # OpenAI, Anthropic, this project
            r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,99}",  # Stripe
            r"hf_[A-Za-z0-9]{30,64}",  # Hugging Face
            r"npm_[A-Za-z0-9]{36}",
            r"pypi-[A-Za-z0-9_-]{60,400}",
            r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}",  # SendGrid
            r"eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{16,1000}",  # JSON web token
        ]
    )
    + r")"
)
_KEY_END = r"-----END [A-Z ]{0,20}PRIVATE KEY-----"
_PRIVATE_KEY = re.compile(
    rf"-----BEGIN [A-Z ]{{0,20}}PRIVATE KEY-----(?:[A-Za-z0-9+/=\s:,]|-(?!-))*(?P<end>{_KEY_END})?"
)
_END_BEGINNING = re.compile(r"-{0,5}[A-Z -]{0,40}\Z")
_NAMED = re.compile(
    r"(?i:api[_-]?key|access[_-]?key|secret|token|passwd|password|pwd)[A-Za-z_-]{0,16}[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
    r"(?P<value>[A-Za-z0-9+/_.~!@#$%^&*-]{12,250})"
)
_MIN_BITS_PER_CHARACTER = 3.0
"""Of a named value: `change-me-please` has words, 2.9 bits; 16 random base-64 characters have 3.5 or more."""

_BEGINNINGS = re.compile(
    r"(?:-----BEGIN[A-Z -]{0,40}"
    r"|(?i:api[_-]?key|access[_-]?key|secret|token|passwd|password|pwd)[A-Za-z_-]{0,16}[\"']?\s{0,3}(?:[:=]\s{0,3}[\"']?)?"
    r"|[!-~]{1,4300})\Z"
)


class CredentialDetector:
    """Finds secrets by their form, and by entropy where only their name tells."""

    def find(self, text: str) -> list[Finding]:
        """Return the secrets of a text; of a named one only the value."""
        spans = [match.span() for pattern in (_PRIVATE_KEY, _KEYS) for match in pattern.finditer(text)]
        spans += [match.span("value") for match in _NAMED.finditer(text) if _is_random(match["value"])]
        return [Finding(category=CATEGORY, start=start, end=end) for start, end in spans]

    def undecided(self, text: str) -> int:
        """Return the start of the last word, of a name with nothing after it yet, or of an unfinished private key."""
        for key in _PRIVATE_KEY.finditer(text):
            if key["end"] is None and _END_BEGINNING.match(text, key.end()):
                return key.start()
        match = _BEGINNINGS.search(text, max(0, len(text) - 4400))
        return len(text) if match is None else match.start()


def _is_random(value: str) -> bool:
    """Tell whether a value has letters, digits and the entropy of a random string."""
    counts = Counter(value)
    bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    has_both = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return has_both and bits >= _MIN_BITS_PER_CHARACTER
