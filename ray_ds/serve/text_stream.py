"""Tokens become text piece by piece: characters are never split, stop strings never slip out."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes one answer's bytes as they come, and ends it at a stop string wherever token borders lie.

    Text that may yet turn out to begin a stop string is held back until the next bytes decide.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        # Bytes that no continuation can make UTF-8 become U+FFFD, as in bytes.decode(errors="replace").
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.num_chars = 0
        """Characters decoded so far, held ones included."""
        self.is_stopped = False
        """Whether a stop string has ended the text."""

    def push(self, data: bytes, *, may_stop: bool = True) -> str:
        """Return the text that is now certain.

        Args:
            may_stop: whether a stop string that these bytes complete ends the text; otherwise it is text like other.
        """
        return self._release(self._decoder.decode(data), may_stop)

    def finish(self) -> str:
        """Return what is left at the end of the answer; the start of a cut character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True), may_stop=True)
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str, may_stop: bool) -> str:
        if self.is_stopped:
            return ""
        self.num_chars += len(new)
        text = self._held + new
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0] if may_stop else []
        if ends:
            self.is_stopped = True
            self._held = ""
            return text[: min(ends)]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that is a beginning of a stop string."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
