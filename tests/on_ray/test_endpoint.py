import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray

from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ConfigError
from ray_ds.on_ray import endpoint
from ray_ds.on_ray.endpoint import endpoint_url, head_node, start_proxy
from ray_ds.on_ray.grpc_ingress import SERVICER_FUNCTION

HEAD = {"NodeID": "a1", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 1.0, "node:__internal_head__": 1.0}}
WORKER = {"NodeID": "b2", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 8.0, "node:10.0.0.2": 1.0}}


@pytest.fixture(autouse=True)
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    before_restart = {**HEAD, "NodeID": "dead", "NodeManagerAddress": "10.0.0.9", "Alive": False}
    nodes = [before_restart, {**WORKER, "Alive": True}, {**HEAD, "Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


def test_the_head_is_found_wherever_this_process_runs() -> None:
    assert head_node()["NodeID"] == "a1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/m"),
        ("::1", "http://[::1]:8000/m"),
        ("0.0.0.0", "http://10.0.0.1:8000/m"),
    ],
)
def test_clients_are_told_where_the_proxy_listens(host: str, url: str) -> None:
    settings = ServeSettings(host=host, route_prefix="/m", api_key_env="KEY")
    assert endpoint_url(settings) == url


def test_an_endpoint_with_tls_is_told_by_the_certificates_name() -> None:
    settings = ServeSettings(
        host="0.0.0.0", api_key_env="KEY", tls_cert_file="/c.pem", tls_key_file="/k.pem", tls_name="llm.example.com"
    )
    assert endpoint_url(settings) == "https://llm.example.com:8000"


def test_a_cluster_with_haproxy_is_not_taken_for_one_that_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_on_head", lambda task, *arguments: "1")
    message = (
        r"serve.ingress \(proxy\) must be haproxy: RAY_SERVE_ENABLE_HA_PROXY is 1 on the head node; set it so, or "
        r"start the cluster anew with RAY_SERVE_ENABLE_HA_PROXY=0"
    )
    with pytest.raises(ConfigError, match=message):
        start_proxy(ServeSettings(), "serve")


def test_serve_is_started_with_grpc_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(endpoint, "_on_head", lambda task, *arguments: None)
    monkeypatch.setattr(endpoint, "proxy_address", lambda: None)
    monkeypatch.setattr(endpoint, "_check_port_is_free", lambda *arguments: None)
    monkeypatch.setattr(endpoint.serve, "start", lambda *, grpc_options, **_: started.append(grpc_options))
    opened = {"host": "0.0.0.0", "api_key_env": "KEY"}
    for settings in (ServeSettings(**opened), ServeSettings(**opened, grpc_port=9100)):
        endpoint.start_proxy(settings, "serve")
    without, with_port = started
    assert without is None
    assert (with_port.port, with_port.grpc_servicer_functions) == (9100, [SERVICER_FUNCTION])  # type: ignore[attr-defined]
