"""A live server around the fake model: uvicorn on a free port, in a thread."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from ray_ds.config.keys import ApiKey
from ray_ds.serve.engine import Engine
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.app import build_app
from ray_ds.serve.http.service import CompletionService, ModelCard
from ray_ds.serve.keys import KeyRing, hash_api_key
from ray_ds.serve.limits import LocalLedger


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
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
    assert not thread.is_alive()
