"""gRPC through Ray Serve's proxy, to a replica that answers HTTP too."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import grpc
import httpx
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from ray_ds.on_ray.grpc_ingress import SERVICER_FUNCTION
from tests.serve.grpc.reflecting_client import KEY, ReflectingClient

pytestmark = pytest.mark.ray

METADATA = (*KEY, ("application", "letters"))
ROOT = str(Path(__file__).parents[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def letters() -> serve.Application:
    """Return a replica whose model goes on with the alphabet. Its class is local, so that it is sent by value."""
    from ray_ds.on_ray.grpc_ingress import GrpcMethods

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    @serve.ingress()
    class Letters(GrpcMethods):
        def __init__(self) -> None:
            from tests.serve.grpc.letters import letters_service

            self._service = letters_service()

        def __serve_build_asgi_app__(self):
            from ray_ds.serve.http.app import build_app

            return build_app(self._service)

    return Letters.bind()


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    http_port, grpc_port = free_port(), free_port()
    environment = {"PYTHONPATH": ROOT}
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=80_000_000,
        include_dashboard=False,
        runtime_env={"env_vars": environment},
        log_to_driver=False,
    )
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host="127.0.0.1", port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=[SERVICER_FUNCTION]),
    )
    serve.run(letters(), name="letters", route_prefix="/")
    yield http_port, grpc_port
    serve.shutdown()
    ray.shutdown()


@pytest.mark.shows("A replica behind Ray Serve answers HTTP and gRPC, whole and streamed, with reflection")
def test_one_replica_answers_grpc_and_http(ports: tuple[int, int]) -> None:
    http_port, grpc_port = ports
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        client = ReflectingClient(channel)
        whole = client.call("Generate", METADATA, prompt="abc", max_tokens=4)
        assert whole.text == "defg" and whole.finish_reason == "length" and whole.completion_tokens == 4
        parts = list(client.call("GenerateStream", METADATA, prompt="abc", max_tokens=4))
        assert [part.text for part in parts] == ["d", "e", "f", "g"]
        assert client.call("Health", METADATA[1:]).is_ready
        with pytest.raises(grpc.RpcError, match="missing or wrong API key") as caught:
            client.call("Generate", METADATA[1:], prompt="abc")
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError, match="the model holds 256 tokens") as caught:
            list(client.call("GenerateStream", METADATA, prompt="abc", max_tokens=400))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    body = {"prompt": "abc", "max_tokens": 4}
    headers = {"Authorization": "Bearer sk-test"}
    response = httpx.post(f"http://127.0.0.1:{http_port}/v1/completions", json=body, headers=headers)
    assert response.json()["choices"][0]["text"] == "defg"
