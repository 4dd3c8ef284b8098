"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: what the model reads for a text.

Text that spells a special token is text, in every prompt. One exception is here, for clients that look ids up by name
(lm_eval's remote tokenizer does): a text that is a special token's name and nothing else, without
`add_special_tokens`, is that token.
"""

import asyncio
from typing import Annotated

from fastapi import Request, Response
from pydantic import BaseModel, Field

from ray_ds.serve.http.answers import json_response
from ray_ds.serve.http.body import Body
from ray_ds.serve.http.chat import ChatMessage, encode_messages
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.logprobs import token_text
from ray_ds.serve.http.prompts import check_token_ids
from ray_ds.serve.http.sampling import TokenId
from ray_ds.serve.http.service import CompletionService


class TokenizeBody(Body):
    """A text, or messages; one of them."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """A chat, as the model's template writes it, up to where the answer begins."""
    add_special_tokens: bool = True
    """Whether a text starts with BOS where documents did in training."""
    return_token_strs: bool | None = None
    """Whether each token's text is told too."""


class Tokens(BaseModel):
    """What the model reads."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    """Token ids."""

    tokens: list[TokenId]


class DetokenizedText(BaseModel):
    """Their text; special tokens have none."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to know to write prompts itself."""

    tokenizer_class: str
    """Which class of transformers reads the model's tokenizer files."""
    vocab_size: int
    model_max_length: int
    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: str | None


async def tokenize(request: Request, body: TokenizeBody, service: CompletionService) -> Response:
    """Answer with the tokens of a text or of messages."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "send either prompt or messages", param="prompt")
    if body.messages is not None:
        tokens = list(await encode_messages(body.messages, service))
    else:
        tokens = await asyncio.to_thread(_encode, body.prompt or "", body.add_special_tokens, service)
    strings = [token_text(service.tokenizer, token) for token in tokens] if body.return_token_strs else None
    length = service.engine.max_model_len
    return json_response(Tokens(count=len(tokens), max_model_len=length, tokens=tokens, token_strs=strings))


def _encode(text: str, add_special_tokens: bool, service: CompletionService) -> list[int]:
    tokenizer = service.tokenizer
    if add_special_tokens:
        return tokenizer.encode_prompt(text)
    special = tokenizer.special_ids.get(text)
    return tokenizer.encode(text) if special is None else [special]


async def detokenize(request: Request, body: DetokenizeBody, service: CompletionService) -> Response:
    """Answer with the text of tokens."""
    check_token_ids(body.tokens, service.tokenizer, "tokens")
    data = b"".join(map(service.tokenizer.token_bytes, body.tokens))
    return json_response(DetokenizedText(prompt=data.decode("utf-8", errors="replace")))


async def tokenizer_info(request: Request, service: CompletionService) -> Response:
    """Answer with the names of special tokens and the chat template."""
    tokenizer = service.tokenizer
    info = TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast",
        vocab_size=tokenizer.vocab_size,
        model_max_length=service.engine.max_model_len,
        bos_token=token_text(tokenizer, tokenizer.bos_id),
        eos_token=token_text(tokenizer, tokenizer.eos_id),
        pad_token=token_text(tokenizer, tokenizer.pad_id),
        chat_template=None if service.chat is None else service.chat.template.source,
    )
    return json_response(info)
