"""A live server around the fake model: uvicorn on a free port, in a thread."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import httpx
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp
from torch import Tensor

from ray_ds.chat.template import ChatTemplate
from ray_ds.config.keys import ApiKey
from ray_ds.errors import InputError
from ray_ds.serve.engine import Engine
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.app import build_app
from ray_ds.serve.http.service import CompletionService, ModelCard
from ray_ds.serve.keys import KeyRing, hash_api_key
from ray_ds.serve.limits import LocalLedger
from tests.serve.conftest import ByteTokenizer
from tests.serve.http.teacher import TeacherEngine


class ServedTokenizer(ByteTokenizer):
    """With the names of its special tokens."""

    pad_id = 2
    special_ids: ClassVar = {"<|bos|>": 0, "<|eos|>": 1, "<|pad|>": 2}


@pytest.fixture
def tokenizer() -> ServedTokenizer:
    return ServedTokenizer()


class Lines:
    """A chat template's stand-in: roles and texts by lines."""

    template = ChatTemplate("{{ messages }}")

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if messages[-1]["role"] != "user":
            raise InputError("messages", "roles", "must end with the user's", "correct them")
        return list("\n".join(f"{m['role']}: {m['content']}" for m in messages).encode())


@pytest.fixture
def api_key() -> str:
    return "sk-test-0123456789"


@pytest.fixture
def access(api_key: str) -> Access:
    keys = KeyRing({"test": ApiKey(sha256=hash_api_key(api_key))}, None)
    return Access(keys=keys, ledger=LocalLedger(), request_timeout_s=60)


@pytest.fixture
def service(engine: Engine, tokenizer, access: Access) -> CompletionService:
    card = ModelCard(
        model_id="team/tiny",
        digest="0123456789abcdef",
        model_digest="fedcba9876543210",
        kind="QuantizedModel",
        integer_path="onednn",
        created=1,
    )
    return CompletionService(engine=engine, tokenizer=tokenizer, card=card, access=access, max_body_bytes=10_000)


@pytest.fixture
def teacher(tokenizer: ServedTokenizer) -> TeacherEngine:
    """Its logits follow from a token and its place; it never ends by itself."""

    def logits(sequence: Sequence[int]) -> Tensor:
        rows = []
        for place, token in enumerate(sequence):
            generator = torch.Generator().manual_seed(1000 * place + token)
            rows.append(torch.randn(tokenizer.vocab_size, generator=generator) * 3)
        table = torch.stack(rows)
        table[:, :3] = -50.0
        return table

    return TeacherEngine(logits, tokenizer)


@pytest.fixture
def taught(service: CompletionService, teacher: TeacherEngine) -> Iterator[httpx.Client]:
    """A client of a service with a chat template, whose engine knows all that the API asks for."""
    with serving(dataclasses.replace(service, engine=teacher, chat=Lines())) as url:
        headers = {"Authorization": "Bearer sk-test-0123456789"}
        with httpx.Client(base_url=url, headers=headers, timeout=20) as client:
            yield client


@pytest.fixture
def url(service: CompletionService) -> Iterator[str]:
    with serving(service) as url:
        yield url


@pytest.fixture
def both(service: CompletionService, teacher: TeacherEngine) -> Iterator[str]:
    """The address of two models: at /a one that chats, at /b one that only goes on."""
    card = dataclasses.replace(service.card, model_id="team/other", model_digest="other", digest="endpoint-other")
    first = dataclasses.replace(service, engine=teacher, chat=Lines())
    second = dataclasses.replace(service, engine=teacher, card=card)
    with serving_app(Starlette(routes=[Mount("/a", build_app(first)), Mount("/b", build_app(second))])) as url:
        yield url


@contextlib.contextmanager
def serving(service: CompletionService) -> Iterator[str]:
    """Give the address of a service while it is up."""
    with serving_app(build_app(service)) as url:
        yield url


@contextlib.contextmanager
def serving_app(app: ASGIApp) -> Iterator[str]:
    """Give the address of an application while it is up."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
    assert not thread.is_alive()
