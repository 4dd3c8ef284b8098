"""What goes into the engine and what comes out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "content_filter"]
"""`stop`: an end-of-text token, a stop token or a stop string; `length`: max_tokens; `content_filter`: the safety
filter ended it, never the engine."""

MAX_LOGPROBS = 20
"""Most alternatives a token may come with, as in OpenAI's chat API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen.

    The logits first get what `logit_bias` adds, then the penalties; tokens that may not come are left out; then
    temperature, `top_k`, `top_p` and `min_p` in this order, as in vLLM.
    """

    max_tokens: int
    """0 only with `prompt_logprobs`: score the prompt and answer nothing."""
    min_tokens: int = 0
    """Tokens before which nothing ends the answer: end-of-text and stop tokens are left out, stop strings ignored."""
    ignore_eos: bool = False
    """Whether the tokenizer's own end-of-text tokens are tokens like others."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer beside the tokenizer's own; they are not part of its text."""
    temperature: float = 1.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Choose among this many of the likeliest tokens; None = all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the likeliest."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has, as in OpenAI's API."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time that the answer has it."""
    repetition_penalty: float = 1.0
    """Logits of the prompt's and the answer's tokens are divided by it where positive, else multiplied: CTRL."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    seed: str | None = None
    """What the answer's own random numbers follow from; None = no two runs are alike."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    logprobs: int | None = None
    """How many alternatives each token comes with; None = no log-probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt that wants one answer."""

    prompt: tuple[int, ...]
    """Token ids, at least one; with max_tokens they fit into the engine's `max_model_len`."""
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingRequest:
    """One text that wants one vector."""

    prompt: tuple[int, ...]
    """Token ids, at least one, at most the engine's `max_model_len`."""


Request = GenerationRequest | EmbeddingRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """How likely a token was before all that `SamplingParams` does, and what else was likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability), likeliest first."""
    text_offset: int
    """Characters of the answer, or of the prompt's text, before this token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScores:
    """The log-probabilities of a prompt; comes once, before the first piece, where they were asked for."""

    logprobs: tuple[TokenLogprobs, ...]
    """Of the prompt's tokens from the second on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next part of an answer. All pieces' texts in a row are the answer."""

    text: str
    num_tokens: int
    """Tokens sampled since the piece before."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last piece."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the cache and not computed; the same on all pieces of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """The answer to an `EmbeddingRequest`: its only event."""

    values: tuple[float, ...]
    """The mean over the tokens of the last layer's normed hidden state, of length 1 (L2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The end of an answer that the engine could not finish."""

    message: str


Event = PromptScores | Piece | Embedding | Failure

Emit = Callable[[Event], None]
"""Takes a request's events on the engine's thread: it must return at once and must not raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What the engine is doing, at one moment; counters count since its start."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens, of requests waiting or running, that are still to be computed."""
    num_cached_tokens: int
    """Tokens the cache holds for running requests."""
    num_cache_tokens: int
    """Tokens the cache has room for."""
    prefill_tokens_per_s: float
    """How fast prompts are computed lately; 0 until the first was."""
    decode_tokens_per_s: float
    """How fast tokens are sampled lately, all answers together; 0 until the first was."""
    num_steps: int
    num_tokens: int
    """Tokens sampled."""
    num_prompt_tokens: int
    """Prompt tokens taken in, found in the cache or not."""
    num_prefix_hits: int
    """Prompt tokens found in the cache."""
    num_preemptions: int
    """Times that a running request gave its place in the cache to an older one."""
