"""Log-probabilities in the three layouts that clients know: OpenAI's for completions, its for chats, and vLLM's."""

from collections.abc import Sequence

from pydantic import BaseModel

from ray_ds.serve.http.service import ServingTokenizer
from ray_ds.serve.requests import TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; as in vLLM."""


class CompletionLogprobs(BaseModel):
    """Of a completion's tokens, a list each. A prompt's first token has no log-probability: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens, and the one that came."""
    text_offset: list[int]
    """Characters of the choice's text before each token."""


class TopLogprob(BaseModel):
    """One of the likeliest tokens in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of all tokens of a chat's answer."""

    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(BaseModel):
    """A token that came in a place of the prompt, or might have; vLLM's layout."""

    logprob: float
    rank: int | None
    """1 = the likeliest; null = less likely than those asked for."""
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""A place each, by token id; the first place has none."""


def completion_logprobs(
    tokenizer: ServingTokenizer, entries: Sequence[TokenLogprobs], *, offset: int = 0
) -> CompletionLogprobs:
    """Return the log-probabilities of an answer's tokens.

    Args:
        offset: characters of the choice's text before the answer.
    """
    tops = [{token_text(tokenizer, token): _finite(value) for token, value in _with_own(entry)} for entry in entries]
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, entry.token) for entry in entries],
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        top_logprobs=list(tops),
        text_offset=[offset + entry.text_offset for entry in entries],
    )


def echo_logprobs(
    tokenizer: ServingTokenizer, prompt: Sequence[int], entries: Sequence[TokenLogprobs], *, num_top: int
) -> CompletionLogprobs:
    """Return those of an echoed prompt: its first token, with null, then the others.

    Args:
        entries: of the prompt's tokens from the second on, with at least `num_top` alternatives.
    """
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, token) for token in prompt],
        token_logprobs=[None, *(_finite(entry.logprob) for entry in entries)],
        top_logprobs=[
            None,
            *(
                {token_text(tokenizer, token): _finite(value) for token, value in _with_own(entry, num_top)}
                for entry in entries
            ),
        ],
        text_offset=[0, *(entry.text_offset for entry in entries)],
    )


def join_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return the log-probabilities of a text that is two texts in a row."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(tokenizer: ServingTokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Return the log-probabilities of a chat's answer."""
    return ChatLogprobs(
        content=[
            ChatLogprob(
                **_top_logprob(tokenizer, entry.token, entry.logprob).model_dump(),
                top_logprobs=[_top_logprob(tokenizer, token, value) for token, value in entry.top],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(tokenizer: ServingTokenizer, entries: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """Return the log-probabilities of a prompt's tokens from the second on, after null for the first."""
    places: PromptLogprobs = [None]
    for entry in entries:
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, start=1)}
        places.append(
            {
                token: PromptLogprob(
                    logprob=_finite(value), rank=ranks.get(token), decoded_token=token_text(tokenizer, token)
                )
                for token, value in _with_own(entry)
            }
        )
    return places


def token_text(tokenizer: ServingTokenizer, token: int) -> str:
    """Return a token's text; the bytes of a part of a character are written as OpenAI does, `bytes:\\xe4\\xb8`."""
    data = tokenizer.token_bytes(token)
    if not data:
        return next((name for name, own in tokenizer.special_ids.items() if own == token), f"<|{token}|>")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top_logprob(tokenizer: ServingTokenizer, token: int, logprob: float) -> TopLogprob:
    text = token_text(tokenizer, token)
    return TopLogprob(token=text, logprob=_finite(logprob), bytes=[*(tokenizer.token_bytes(token) or text.encode())])


def _with_own(entry: TokenLogprobs, num_top: int | None = None) -> list[tuple[int, float]]:
    """Return the likeliest tokens, and the one that came in front where it is none of them."""
    top = list(entry.top[:num_top])
    is_among = any(token == entry.token for token, _ in top)
    return top if is_among else [(entry.token, entry.logprob), *top]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
