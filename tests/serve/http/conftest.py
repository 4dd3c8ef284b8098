"""A live server around the fake model: uvicorn on a free port, in a thread."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
import uvicorn

from ray_ds.serve.engine import Engine
from ray_ds.serve.http.app import build_app
from ray_ds.serve.http.auth import hash_api_key
from ray_ds.serve.http.service import CompletionService, ModelCard
from tests.serve.conftest import ByteTokenizer


class ServedTokenizer(ByteTokenizer):
    """With the names of its special tokens."""

    pad_id = 2
    special_ids: ClassVar = {"<|bos|>": 0, "<|eos|>": 1, "<|pad|>": 2}


@pytest.fixture
def tokenizer() -> ServedTokenizer:
    return ServedTokenizer()


@pytest.fixture
def api_key() -> str:
    return "sk-test-0123456789"


@pytest.fixture
def service(engine: Engine, tokenizer, api_key: str) -> CompletionService:
    card = ModelCard(
        model_id="team/tiny",
        digest="0123456789abcdef",
        model_digest="fedcba9876543210",
        kind="QuantizedModel",
        integer_path="onednn",
        created=1,
    )
    return CompletionService(
        engine=engine, tokenizer=tokenizer, card=card, api_key_hash=hash_api_key(api_key), max_body_bytes=10_000
    )


@pytest.fixture
def url(service: CompletionService) -> Iterator[str]:
    with serving(service) as url:
        yield url


@contextlib.contextmanager
def serving(service: CompletionService) -> Iterator[str]:
    """Give the address of a service while it is up."""
    server = uvicorn.Server(uvicorn.Config(build_app(service), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
