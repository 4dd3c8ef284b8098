"""The screen of one answer: it lets text pass as soon as no detector can object to it any more."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_ds.config.safety import Action
from ray_ds.serve.requests import Piece, TokenLogprobs
from ray_ds.serve.safety.finding import Detector, Finding

CONTEXT_CHARS = 600
"""What detectors see of the text that has passed."""


class OutputScreen:
    """Takes an answer piece by piece. Not for several threads."""

    def __init__(self, detectors: Sequence[Detector], actions: Mapping[str, Action]) -> None:
        """Begin an answer.

        Args:
            actions: by category; others are blocked.
        """
        self._detectors = detectors
        self._actions = actions
        self._passed = ""
        """The end of the text that has passed, before anything was redacted."""
        self._held = ""
        self._num_passed = 0
        self._redacted: list[tuple[int, int, int]] = []
        """(start, end, length of the mark) of all that was redacted, in characters of the answer."""
        self._logprobs: list[TokenLogprobs] = []
        self._num_tokens = 0
        self._has_ended = False

    def take(self, piece: Piece) -> Piece | None:
        """Return what may pass now; None where nothing does. Its tokens then come with the next piece.

        The last piece of an answer that is blocked has the finish reason `content_filter`; nothing follows it.
        """
        if self._has_ended:
            return None
        self._held += piece.text
        self._logprobs += piece.logprobs
        self._num_tokens += piece.num_tokens
        is_last = piece.finish_reason is not None
        text, base = self._passed + self._held, len(self._passed)
        findings = self._find(text, base)
        cut = self._decided(text, base, findings, is_last)
        decided = [finding for finding in findings if finding.end <= cut]
        blocked = [finding.start for finding in decided if self._action(finding) == "block"]
        if blocked:
            cut = max(base, min(blocked))
            decided = [finding for finding in decided if finding.end <= cut]
        passing, logprobs = self._pass(text, base, cut, _disjoint(decided, base))
        self._has_ended = is_last or bool(blocked)
        if not passing and not logprobs and not self._has_ended:
            return None
        num_tokens, self._num_tokens = self._num_tokens, 0
        return replace(
            piece,
            text=passing,
            num_tokens=num_tokens,
            logprobs=logprobs,
            finish_reason="content_filter" if blocked else piece.finish_reason,
        )

    def _action(self, finding: Finding) -> Action:
        return self._actions.get(finding.category, "block")

    def _find(self, text: str, base: int) -> list[Finding]:
        """Return the findings that reach into the text that is held, first ones first."""
        findings = [finding for detector in self._detectors for finding in detector.find(text) if finding.end > base]
        return sorted((f for f in findings if self._action(f) != "allow"), key=lambda finding: finding.start)

    def _decided(self, text: str, base: int, findings: Sequence[Finding], is_last: bool) -> int:
        """Return where the part of the text ends that no detector is undecided about."""
        if is_last:
            return len(text)
        cut = max(base, min((detector.undecided(text) for detector in self._detectors), default=len(text)))
        for finding in reversed(findings):
            if finding.end > cut:
                cut = max(base, min(cut, finding.start))
        return cut

    def _pass(
        self, text: str, base: int, cut: int, redacted: Sequence[Finding]
    ) -> tuple[str, tuple[TokenLogprobs, ...]]:
        """Move `text[base:cut]` from what is held to what has passed; return it as readers see it."""
        origin = self._num_passed - base
        passing, at = "", base
        for finding in redacted:
            mark = f"[{finding.category} removed]"
            passing += text[at : finding.start] + mark
            self._redacted.append((origin + finding.start, origin + finding.end, len(mark)))
            at = finding.end
        passing += text[at:cut]
        self._num_passed = origin + cut
        self._passed, self._held = text[max(0, cut - CONTEXT_CHARS) : cut], text[cut:]
        return passing, self._pass_logprobs()

    def _pass_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Return the entries of the tokens that have passed whole, at their new places; of redacted ones none."""
        ends = [*(entry.text_offset for entry in self._logprobs[1:]), self._num_passed + len(self._held)]
        passing = []
        while self._logprobs and ends[0] <= self._num_passed:
            entry, end = self._logprobs.pop(0), ends.pop(0)
            start, end = entry.text_offset, max(end, entry.text_offset + 1)
            if not any(start < last and first < end for first, last, _ in self._redacted):
                added = sum(length - (last - first) for first, last, length in self._redacted if last <= start)
                passing.append(replace(entry, text_offset=start + added))
        return tuple(passing)


def _disjoint(findings: Sequence[Finding], base: int) -> list[Finding]:
    """Return findings in order, at or after `base`, without overlap: what two share goes to the first."""
    found: list[Finding] = []
    at = base
    for finding in findings:
        start = max(finding.start, at)
        if finding.end > start:
            found.append(replace(finding, start=start))
            at = finding.end
    return found
