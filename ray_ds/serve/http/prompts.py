"""The four forms of a prompt, in completions and embeddings alike, and the token ids they become."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import CompletionService, ServingTokenizer

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
"""A text, texts, token ids, or lists of token ids."""


async def encode_prompts(
    prompt: Prompt, service: CompletionService, *, field: str, add_special_tokens: bool = True
) -> list[tuple[int, ...]]:
    """Return the ids of every prompt; ids are taken as they are.

    Args:
        field: where the prompt came from, for messages.
        add_special_tokens: whether a text starts with BOS where documents did in training.
    Raises:
        ApiError: 400, an id is none of the tokenizer's, or a text has no tokens.
    """
    # Tokenizing a long text takes a while, in which other answers must go on.
    return await asyncio.to_thread(_encode_all, _apart(prompt), service.tokenizer, field, add_special_tokens)


def _apart(prompt: Prompt) -> list[str | list[int]]:
    """Return every prompt on its own: a list of ids is one."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    return [ids] if ids else [part for part in prompt if not isinstance(part, int)]


def _encode_all(
    texts: Sequence[str | list[int]], tokenizer: ServingTokenizer, field: str, add_special_tokens: bool
) -> list[tuple[int, ...]]:
    prompts = []
    for text in texts:
        if isinstance(text, str):
            text = tokenizer.encode_prompt(text) if add_special_tokens else tokenizer.encode(text)
            if not text:
                raise ApiError(400, f"{field} must have at least one token; an empty text has none", param=field)
        check_token_ids(text, tokenizer, field)
        prompts.append(tuple(text))
    return prompts


def check_token_ids(tokens: Sequence[int], tokenizer: ServingTokenizer, field: str) -> None:
    """Refuse ids that the tokenizer does not have.

    Raises:
        ApiError: 400.
    """
    unknown = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if unknown is not None:
        shown = str(unknown) if abs(unknown) < 10**18 else "of more than 18 digits"
        raise ApiError(400, f"{field}: token id {shown} is not in 0..{tokenizer.vocab_size - 1}", param=field)
