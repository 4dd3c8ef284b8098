"""What goes into the engine and what comes out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-text token or a stop string; `length`: max_tokens."""

MAX_LOGPROBS = 5
"""Most alternatives a token may come with, as in OpenAI's completions API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen."""

    max_tokens: int
    temperature: float = 1.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Choose among this many of the likeliest tokens; None = all."""
    seed: str | None = None
    """What the answer's own random numbers follow from; None = no two runs are alike."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    logprobs: int | None = None
    """How many alternatives each token comes with; None = no log-probabilities at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt that wants one answer."""

    prompt: tuple[int, ...]
    """Token ids, at least one; with max_tokens they fit into the engine's `max_model_len`."""
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """How likely a token was before temperature, top_p and top_k, and what else was likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability), likeliest first."""
    text_offset: int
    """Characters of the answer before this token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next part of an answer. All pieces' texts in a row are the answer."""

    text: str
    num_tokens: int
    """Tokens sampled since the piece before."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The end of an answer that the engine could not finish."""

    message: str


Event = Piece | Failure

Emit = Callable[[Event], None]
"""Takes a request's events on the engine's thread: it must return at once and must not raise."""
