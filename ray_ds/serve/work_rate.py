"""How fast a kind of work goes, over the last seconds that were spent on it."""

from collections import deque

WINDOW_S = 5.0
"""Seconds of work that count; what was done before them is forgotten."""


class WorkRate:
    """Tokens a second of work: time without any does not count."""

    def __init__(self) -> None:
        self._parts: deque[tuple[int, float]] = deque()
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count work that was done."""
        self._parts.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        while self._seconds - self._parts[0][1] > WINDOW_S:
            old_tokens, old_seconds = self._parts.popleft()
            self._tokens -= old_tokens
            self._seconds -= old_seconds

    @property
    def per_s(self) -> float:
        """Tokens a second; 0 before any work."""
        return self._tokens / self._seconds if self._parts else 0.0
