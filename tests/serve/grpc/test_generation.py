"""The gRPC service behind a plain gRPC server, asked by a client that knows it from reflection alone."""

import asyncio
import contextlib
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection

from ray_ds.serve.engine import QueueFullError
from ray_ds.serve.grpc.generation import generate, generate_stream, health, status_code
from ray_ds.serve.grpc.messages import SERVICE, GenerateRequest, add_generation_servicer
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import CompletionService
from tests.serve.grpc.letters import letters_service
from tests.serve.grpc.reflecting_client import KEY, ReflectingClient
from tests.serve.http.conftest import serving
from tests.serve.http.teacher import TeacherEngine


class Servicer:
    """What Serve's proxy and a replica do, in one process."""

    def __init__(self, service: CompletionService) -> None:
        self.service = service

    async def Generate(self, request: Any, context: Any) -> Any:
        try:
            return await generate(self.service, request, context.invocation_metadata())
        except ApiError as error:
            await context.abort(status_code(error), str(error))

    async def GenerateStream(self, request: Any, context: Any) -> Any:
        try:
            async for reply in generate_stream(self.service, request, context.invocation_metadata()):
                yield reply
        except ApiError as error:
            await context.abort(status_code(error), str(error))

    async def Health(self, request: Any, context: Any) -> Any:
        return health(self.service)


@pytest.fixture
def service() -> CompletionService:
    return letters_service()


@pytest.fixture
def teacher(service: CompletionService) -> TeacherEngine:
    assert isinstance(service.engine, TeacherEngine)
    return service.engine


@contextlib.contextmanager
def listening(service: CompletionService) -> Iterator[str]:
    """Give the address of a gRPC server with reflection while it is up."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        add_generation_servicer(Servicer(service), server)
        reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield f"127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def client(service: CompletionService) -> Iterator[ReflectingClient]:
    with listening(service) as address, grpc.insecure_channel(address) as channel:
        yield ReflectingClient(channel)


def test_a_stream_makes_the_whole_answer(client) -> None:
    whole = client.call("Generate", prompt="abc", max_tokens=4)
    assert whole.text == "defg" and whole.finish_reason == "length"
    assert (whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens) == (4, 4, 2)
    replies = list(client.call("GenerateStream", prompt="abc", max_tokens=4))
    assert [reply.text for reply in replies] == ["d", "e", "f", "g"]
    assert [reply.HasField("finish_reason") for reply in replies] == [False, False, False, True]
    assert replies[-1].completion_tokens == 4


@pytest.mark.shows("gRPC answers as HTTP does, and tells its description by reflection")
def test_every_field_asks_the_engine_for_what_http_asks(client, service, teacher) -> None:
    fields = {
        "model": "team/tiny",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.2,
        "seed": 0,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x", "y"],
        "stop_token_ids": [9],
    }
    request = client.service.methods_by_name["Generate"].input_type
    assert {field.name for field in request.fields} == {*fields, "prompt", "prompt_token_ids"}
    client.call("Generate", prompt_token_ids=[5, 6], **fields)
    client.call("Generate", prompt="ab")
    with serving(service) as url:
        headers = {"Authorization": "Bearer sk-test"}
        httpx.post(f"{url}/v1/completions", json={"prompt": [5, 6], **fields}, headers=headers)
        httpx.post(f"{url}/v1/completions", json={"prompt": "ab"}, headers=headers)
    assert teacher.asked[:2] == teacher.asked[2:]


def test_health_needs_no_key(client, service) -> None:
    reply = client.call("Health", metadata=())
    assert reply.is_ready and reply.model == "team/tiny" and reply.digest == "0123"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"prompt": "x", "metadata": ()}, "UNAUTHENTICATED", "API key"),
        ({"prompt": "x", "model": "other"}, "NOT_FOUND", "does not exist"),
        ({}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt": "x", "prompt_token_ids": [5]}, "INVALID_ARGUMENT", "either"),
        ({"prompt_token_ids": [999]}, "INVALID_ARGUMENT", "999"),
        ({"prompt": "x", "max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens"),
        ({"prompt": "x", "temperature": float("nan")}, "INVALID_ARGUMENT", "JSON|temperature"),
        ({"prompt": "x" * 300}, "INVALID_ARGUMENT", "256"),
        ({"prompt": "x" * 20_000}, "INVALID_ARGUMENT", "longer than 10000"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_what_is_wrong_is_said_in_the_status(client, method, fields, code, words) -> None:
    with pytest.raises(grpc.RpcError, match=words) as caught:
        list(client.call(method, **fields)) if method == "GenerateStream" else client.call(method, **fields)
    assert caught.value.code().name == code


def test_a_full_queue_is_resource_exhausted(client, teacher) -> None:
    teacher.refusal = QueueFullError("tokens", 3)
    with pytest.raises(grpc.RpcError, match="no room for more tokens; try again in 3 s") as caught:
        client.call("Generate", prompt="x")
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_requests_go_through_pickle_as_serve_sends_them() -> None:
    request = GenerateRequest(prompt="x", stop=["a"], temperature=0.0)
    assert pickle.loads(pickle.dumps(request)) == request


def test_a_listener_that_leaves_frees_the_engine(service, teacher) -> None:
    cancelled = []
    teacher.cancel = cancelled.append

    async def leave() -> None:
        stream = generate_stream(service, GenerateRequest(prompt="abc", max_tokens=50), KEY)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert len(cancelled) == 1
