"""An endpoint closed to strangers on a real Serve: TLS at the proxy, limits that two replicas share, and its ports."""

import datetime
import ipaddress
import os
import ssl
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import httpx
import openai
import psutil
import pytest
import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ray_ds.artifacts import Artifact
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.errors import ClusterError, ConfigError
from ray_ds.on_ray.endpoint import start_proxy
from ray_ds.serve.client import is_endpoint_alive
from ray_ds.serve.keys import new_key
from ray_ds.stages.serve import serve
from tests.stages.test_serve import checkpoint, folder, free_port, stage_run  # noqa: F401

pytestmark = pytest.mark.ray

JOB_KEY = "sk-job-0123456789"
REQUESTS_PER_MINUTE = 6


@pytest.fixture(scope="module")
def certificate(folder: Path) -> tuple[Path, Path]:  # noqa: F811
    """A certificate for 127.0.0.1 that nobody but its owner has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ray_ds test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return cert_file, key_file


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:  # noqa: F811
    file = folder / "keys.toml"
    return {
        "limited": new_key(file, "limited", {"requests_per_minute": REQUESTS_PER_MINUTE}),
        "counted": new_key(file, "counted", {"requests_per_minute": 100_000}),
        "revoked": new_key(file, "revoked", {}),
    }


def open_ports() -> set[tuple[str, int]]:
    """Return what this cluster's processes listen on beyond loopback, as /proc/net/tcp has it."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    sockets = [one for one in psutil.net_connections("tcp") if one.pid in ours and one.status == psutil.CONN_LISTEN]
    return {tuple(one.laddr) for one in sockets if not ipaddress.ip_address(one.laddr.ip).is_loopback}


@pytest.fixture(scope="module")
def ports_before() -> Iterator[set[tuple[str, int]]]:
    """A cluster of this node, and what it listens on before anything is served."""
    ray.init(address="local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield open_ports()
    ray.serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def settings(folder: Path, certificate: tuple[Path, Path], keys: dict[str, str]) -> ServeSettings:  # noqa: F811
    return ServeSettings(
        model_id="tiny",
        port=free_port(),
        api_key_env="CLOSED_TEST_KEY",
        api_keys_file=str(folder / "keys.toml"),
        tls_cert_file=str(certificate[0]),
        tls_key_file=str(certificate[1]),
        autoscaling=AutoscalingSettings(min_replicas=2, max_replicas=2),
        deploy_timeout_s=90.0,
    )


@pytest.fixture(scope="module")
def endpoint(
    ports_before: set[tuple[str, int]],
    folder: Path,  # noqa: F811
    checkpoint: Artifact,  # noqa: F811
    settings: ServeSettings,
) -> Iterator[Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOSED_TEST_KEY", JOB_KEY)
        patch.setenv("SSL_CERT_FILE", str(settings.tls_cert_file))
        yield serve(settings, stage_run(folder, "Endpoint", "closed", checkpoint))


def client_of(endpoint: Artifact, settings: ServeSettings, key: str) -> openai.OpenAI:
    trusting = httpx.Client(verify=ssl.create_default_context(cafile=settings.tls_cert_file))
    url = f"{endpoint.fact('url')}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30, http_client=trusting)


def test_the_certificate_must_be_there(ports_before: object, settings: ServeSettings, tmp_path: Path) -> None:
    other = tmp_path / "none.pem"
    changed = ServeSettings(**{**vars(settings), "tls_cert_file": str(other)})
    with pytest.raises(ClusterError, match=r"serve.tls_cert_file \(.*none.pem\) must be a certificate with its key"):
        start_proxy(changed, "serve")


def test_haproxy_must_be_what_the_cluster_was_started_with(ports_before: object, settings: ServeSettings) -> None:
    plain = {"tls_cert_file": None, "tls_key_file": None, "host": "0.0.0.0", "ingress": "haproxy"}
    changed = ServeSettings(**{**vars(settings), **plain})
    with pytest.raises(
        ConfigError, match=r"serve.ingress \(haproxy\) must be proxy: RAY_SERVE_ENABLE_HA_PROXY is not 1"
    ):
        start_proxy(changed, "serve")


@pytest.mark.shows("An endpoint with a certificate answers over TLS alone")
def test_clients_come_over_tls(endpoint: Artifact, settings: ServeSettings) -> None:
    assert endpoint.fact("url") == f"https://127.0.0.1:{settings.port}"
    with client_of(endpoint, settings, JOB_KEY) as client:
        answer = client.completions.create(model="tiny", prompt="In the beginning", max_tokens=5, temperature=0)
        chunks = list(client.completions.create(model="tiny", prompt="In", max_tokens=5, stream=True))
    assert answer.usage.completion_tokens == 5 and chunks
    assert is_endpoint_alive(endpoint.manifest.facts)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{endpoint.fact('url')}/health", verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{settings.port}/health")


@pytest.mark.shows("No HTTP of an endpoint listens beyond loopback unless the recipe says so")
def test_no_http_listens_beyond_loopback(
    endpoint: Artifact, settings: ServeSettings, ports_before: set[tuple[str, int]]
) -> None:
    new = open_ports() - ports_before  # Ray's own gRPC: a worker's, and one more of each replica
    assert len(new) >= 2, "the replicas' own were not seen"
    assert {port for _, port in new} & {settings.port, 8404, 8500, 9101} == set()
    for host, port in new:
        address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        for scheme in ("http", "https"):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{scheme}://{address}:{port}/health", timeout=2, verify=False)


@pytest.mark.shows("Two replicas together let a key pass no more than its limit")
def test_the_limits_of_a_key_hold_over_all_replicas(
    endpoint: Artifact, settings: ServeSettings, keys: dict[str, str]
) -> None:
    status = ray.serve.status().applications["ray-ds"].deployments["model"]
    assert status.replica_states["RUNNING"] == 2

    def ask(_: int) -> str:
        with client_of(endpoint, settings, keys["limited"]) as client:
            try:
                client.completions.create(model="tiny", prompt="In", max_tokens=1)
                return "answered"
            except openai.RateLimitError as error:
                assert error.code == "rate_limit_exceeded" and 1 <= int(error.response.headers["retry-after"]) <= 10
                return "refused"

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = Counter(pool.map(ask, range(30)))
    allowed = int(REQUESTS_PER_MINUTE * (1 + (time.monotonic() - started) / 60))
    assert REQUESTS_PER_MINUTE <= results["answered"] <= allowed and results["refused"] == 30 - results["answered"]


def test_what_a_limit_costs(endpoint: Artifact, settings: ServeSettings, keys: dict[str, str]) -> None:
    medians = {}
    for key in (JOB_KEY, keys["counted"]):
        with client_of(endpoint, settings, key) as client:
            times = []
            for _ in range(60):
                started = time.perf_counter()
                client.completions.create(model="tiny", prompt="In", max_tokens=1)
                times.append(time.perf_counter() - started)
        medians[key] = statistics.median(times) * 1e3
    print(f"a request of one token: {medians[JOB_KEY]:.2f} ms, with a limit {medians[keys['counted']]:.2f} ms")
    assert medians[keys["counted"]] < medians[JOB_KEY] + 50


def test_a_key_is_revoked_without_a_restart(endpoint: Artifact, settings: ServeSettings, keys: dict[str, str]) -> None:
    file = Path(str(settings.api_keys_file))
    with client_of(endpoint, settings, keys["revoked"]) as client:
        client.models.list()
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith("revoked")))
        time.sleep(1.1)
        for _ in range(6):  # both replicas
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_a_ledger_that_dies_lets_nobody_pass_until_it_is_back(
    endpoint: Artifact, settings: ServeSettings, keys: dict[str, str]
) -> None:
    [name] = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "ledger" in one["name"]]
    ray.kill(ray.get_actor(name, namespace="serve"))
    seen = Counter()
    deadline = time.monotonic() + 60
    with client_of(endpoint, settings, keys["counted"]) as client:
        while seen["answered"] < 5:
            assert time.monotonic() < deadline, seen
            try:
                client.completions.create(model="tiny", prompt="In", max_tokens=1)
                seen["answered"] += 1
            except openai.InternalServerError as error:
                assert error.status_code == 503 and error.code == "limits_unavailable"
                seen["unavailable"] += 1
                time.sleep(0.1)
    assert seen["unavailable"] > 0
