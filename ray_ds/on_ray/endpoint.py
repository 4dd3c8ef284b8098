"""Bringing up Serve's HTTP proxy and an application, and waiting until it answers."""

import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.api import RunTarget
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ClusterError, ConfigError
from ray_ds.on_ray.grpc_ingress import SERVICER_FUNCTION
from ray_ds.serve.client import read_health

POLL_S = 0.25
TLS_HINT = "; the certificate must be for this address and its issuer trusted here, or named in SSL_CERT_FILE"
STOP_SERVING = "stop serving there first (serve.shutdown, or restart the cluster)"
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
HEAD_RESOURCE = "node:__internal_head__"
"""What Ray gives the head node to have, and no other."""
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


def start_proxy(settings: ServeSettings, step: str) -> None:
    """Start Serve with one HTTP proxy on the head node, unless this cluster has it already.

    Raises:
        ClusterError: another program has the port, the address is none of this host, or a TLS file is not there.
        ConfigError: this cluster's proxy listens elsewhere or otherwise, or its ingress is another.
    """
    _check_ingress(settings, step)
    running = proxy_address()
    if running is None:
        _check_port_is_free(settings.host, settings.port, step)
        _check_tls_files(settings, step)
        options = HTTPOptions(
            host=settings.host,
            port=settings.port,
            ssl_keyfile=settings.tls_key_file,
            ssl_certfile=settings.tls_cert_file,
        )
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=options,
            grpc_options=_grpc_options(settings),
        )
    elif running != (settings.host, settings.port):
        host, port = running
        raise ConfigError(
            f"{step}.port",
            f"{settings.host}:{settings.port}",
            f"must be {host}:{port}, where this cluster's proxy for all applications listens",
            f"set host and port so, or {STOP_SERVING}",
        )
    elif (certificate := _get_global_client().http_config.ssl_certfile) != settings.tls_cert_file:
        allowed = f"must be {certificate or 'absent'}, as this cluster's proxy was started"
        raise ConfigError(f"{step}.tls_cert_file", settings.tls_cert_file or "absent", allowed, STOP_SERVING)
    elif settings.grpc_port is not None and (other := grpc_port()) != settings.grpc_port:
        allowed = f"must be {other or 'absent'}, as this cluster's proxy was started"
        raise ConfigError(f"{step}.grpc_port", settings.grpc_port, allowed, STOP_SERVING)


def proxy_address() -> tuple[str, int] | None:
    """Return where this cluster's Serve listens, or None while there is none. Serve tells it in private only."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def grpc_port() -> int | None:
    """Return where this cluster's gRPC proxy listens, or None where it has none. Serve tells it in private only."""
    options = ray.get(_get_global_client()._controller.get_grpc_config.remote())
    return int(options.port) if options.grpc_servicer_functions else None


def _grpc_options(settings: ServeSettings) -> gRPCOptions | None:
    if settings.grpc_port is None:
        return None
    return gRPCOptions(port=settings.grpc_port, grpc_servicer_functions=[SERVICER_FUNCTION])


def _check_ingress(settings: ServeSettings, step: str) -> None:
    """Refuse an ingress that the cluster was not started for: HAProxy would listen on all addresses unasked."""
    cluster = "haproxy" if _on_head(_read_variable, HAPROXY_VARIABLE) == "1" else "proxy"
    if settings.ingress != cluster:
        state = "1" if cluster == "haproxy" else "not 1"
        allowed = f"must be {cluster}: {HAPROXY_VARIABLE} is {state} on the head node"
        action = f"set it so, or start the cluster anew with {HAPROXY_VARIABLE}={'01'[settings.ingress == 'haproxy']}"
        raise ConfigError(f"{step}.ingress", settings.ingress, allowed, action)


def _check_tls_files(settings: ServeSettings, step: str) -> None:
    """Load the certificate and its key on the head node, as the proxy will."""
    if settings.tls_cert_file is not None:
        reason = _on_head(_try_to_load, settings.tls_cert_file, settings.tls_key_file)
        if reason is not None:
            allowed = f"must be a certificate with its key, readable on the head node ({reason})"
            raise ClusterError(f"{step}.tls_cert_file", settings.tls_cert_file, allowed, "mend the files")


def _on_head(task: Any, *arguments: object) -> Any:
    """Return what a remote function returns on the head node."""
    place = NodeAffinitySchedulingStrategy(head_node()["NodeID"], soft=False)
    return ray.get(task.options(scheduling_strategy=place, num_cpus=0).remote(*arguments))


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator, unused-ignore]
def _read_variable(name: str) -> str | None:
    """Return a variable of this node's environment."""
    return os.environ.get(name)


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator, unused-ignore]
def _try_to_load(certificate: str, key: str) -> str | None:
    """Return why a server cannot use a certificate with a key, or None."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        return str(error)
    return None


def _check_port_is_free(host: str, port: int, step: str) -> None:
    """Try the address on the head node, where the proxy will listen."""
    reason = _on_head(_try_to_listen, host, port)
    if reason is not None:
        action = "choose another port, or stop the program that has this one"
        raise ClusterError(f"{step}.port", f"{host}:{port}", f"must be free on the head node ({reason})", action)


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator, unused-ignore]
def _try_to_listen(host: str, port: int) -> str | None:
    """Return why this node cannot listen at an address, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error)
    return None


def head_node() -> dict[str, Any]:
    """Return Ray's record of the cluster's head node."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return next(node for node in nodes if node["Alive"] and HEAD_RESOURCE in node["Resources"])


def endpoint_url(settings: ServeSettings) -> str:
    """Return the address that clients use, without a slash at its end."""
    host = head_node()["NodeManagerAddress"] if settings.host in ("0.0.0.0", "::") else settings.host
    host = settings.tls_name or host
    address = f"[{host}]" if ":" in host else host
    scheme = "http" if settings.tls_cert_file is None else "https"
    return f"{scheme}://{address}:{settings.port}{settings.route_prefix.rstrip('/')}"


def check_route(settings: ServeSettings, step: str) -> None:
    """Refuse a path that another application of this cluster answers on.

    Raises:
        ConfigError: there is one.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    details = {} if client is None else client.get_serve_details()["applications"]
    for name, application in details.items():
        if name != settings.app_name and application["route_prefix"] == settings.route_prefix:
            allowed = f"must be none that the application {name} of this cluster answers on"
            action = f"choose another, or set app_name = {name!r} to replace that application"
            raise ConfigError(f"{step}.route_prefix", settings.route_prefix, allowed, action)


def deploy(application: Application, settings: ServeSettings, digest: str, report: Callable[[str], None]) -> str:
    """Deploy or replace the application; return its address once it answers with `digest`.

    Args:
        report: takes a word on how far it has come.
    Raises:
        ClusterError: it failed, or did not answer in time.
    """
    target = RunTarget(target=application, name=settings.app_name, route_prefix=settings.route_prefix)
    serve.run_many([target], wait_for_applications_running=False)
    url = endpoint_url(settings)
    deadline = time.monotonic() + settings.deploy_timeout_s
    while True:
        status = serve.status().applications[settings.app_name]
        if status.status in FAILED:
            reason = f"{status.status.value}: {_messages(status)}"
            raise ClusterError(f"application {settings.app_name}", reason, "must start", "mend what it says")
        health = read_health(url) if status.status == ApplicationStatus.RUNNING else None
        if health is not None and health.get("digest") == digest:
            return url
        if time.monotonic() > deadline:
            raise ClusterError(
                f"endpoint {url}",
                f"{status.status.value}: {_messages(status)}",
                f"must answer within deploy_timeout_s ({settings.deploy_timeout_s:g})",
                "see `serve status`, or raise deploy_timeout_s"
                + (TLS_HINT if settings.tls_cert_file is not None else ""),
            )
        report(status.status.value)
        time.sleep(POLL_S)


def _messages(status: serve.schema.ApplicationStatusOverview) -> str:
    """Return the last lines of what Serve says about an application and its deployments."""
    texts = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "no message"
