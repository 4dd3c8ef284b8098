"""Settings of the serve stage."""

from typing import Annotated, Literal

from pydantic import Field

from ray_ds.config.safety import SafetySettings
from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.errors import ConfigError

ABSOLUTE_PATH = r"^/"

SCALING_DEFAULTS = {"target_ongoing_requests": 4.0, "upscale_delay_s": 5.0, "downscale_delay_s": 60.0}
"""What is in force where `max_replicas` is above `min_replicas`."""


@settings
class AutoscalingSettings:
    """How many replicas answer; what says when their number changes must be left out where it cannot."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas that are always there."""
    max_replicas: Annotated[int, Field(ge=1)] = 2
    """Replicas there may be under load; no more than the cluster has room for ever start."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    """Requests a replica should have at a time: with more on average one is added, with fewer one is taken away; absent
    = 4."""
    upscale_delay_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds of too much load before a replica is added; absent = 5."""
    downscale_delay_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds of too little load before a replica is taken away; absent = 60."""

    def __post_init__(self) -> None:
        """Refuse ranges without a number in them, and rules that would never be used."""
        if self.max_replicas < self.min_replicas:
            allowed = f"must be at least min_replicas ({self.min_replicas})"
            raise ConfigError("max_replicas", self.max_replicas, allowed, "raise it")
        is_fixed = self.max_replicas == self.min_replicas
        unused = f"has no effect while min_replicas = max_replicas = {self.min_replicas}" if is_fixed else None
        for name, default in SCALING_DEFAULTS.items():
            fill_or_refuse(self, name, default, unused=unused)


@settings
class ServeSettings:
    """How a model is served."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] = "ray-ds"
    """The model's name in the API."""
    app_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "ray-ds"
    """Name of the Serve application. Deploying again under the same name replaces the model."""
    route_prefix: Annotated[str, Field(pattern=r"^/([A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*)?$")] = "/"
    """Path below which the endpoint answers; applications of one cluster need different ones."""
    host: str = "127.0.0.1"
    """Address the endpoint listens on, on the head node; 0.0.0.0 = all of them, for which an API key is a must. Ray's
    own gRPC, one port of each replica among it, always listens on all: RAY_AUTH_MODE=token guards it."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the HTTP proxy, one for all applications of a cluster."""
    ingress: Literal["proxy", "haproxy"] = "proxy"
    """What listens there: Serve's own proxy, or the HAProxy that comes with Ray, which is faster (one hop) and needs
    `RAY_SERVE_ENABLE_HA_PROXY=1` on every node before Ray starts. With HAProxy every node listens on all addresses
    whatever the host: a firewall must close its statistics (8404) and metrics (9101), which want no key; the replicas
    (30000 to 31000) and Serve's own proxy behind it (8500) want one."""
    tls_cert_file: Annotated[str, Field(pattern=ABSOLUTE_PATH)] | None = None
    """Certificate chain, PEM, on the head node; None = plain HTTP, for loopback or behind something that ends TLS."""
    tls_key_file: Annotated[str, Field(pattern=ABSOLUTE_PATH)] | None = None
    """The certificate's private key, PEM without a password, on the head node."""
    tls_name: str | None = None
    """Name in the certificate by which clients reach the head node; None = its address."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds an API key without limits, read by the job, which asks its question with it; None
    = open to all who reach the port."""
    api_keys_file: Annotated[str, Field(pattern=ABSOLUTE_PATH)] | None = None
    """File of more API keys, hashed and with limits, which every node reads; `ray-ds keys new` writes it. A changed
    file is taken up within a second, without a restart."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of prompt and answer together; None = as many as the model was made for."""
    max_running_requests: Annotated[int, Field(ge=1)] = 8
    """Answers a replica writes at the same time; each reserves the cache of `max_model_len` tokens."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait at a replica; more are refused with 429."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_000_000
    """Longest body of a request."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from a request's first byte to its answer's last, after which it ends with an error."""
    safety: SafetySettings = SafetySettings()
    """What prompts and answers must not hold."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights that are not INT8, of the activations between layers and of the cache."""
    cpus_per_replica: Annotated[int, Field(ge=1)] = 1
    """CPUs a replica reserves, and the threads it computes with."""
    gpus_per_replica: Annotated[float, Field(ge=0, le=1)] = 0.0
    """GPU a replica reserves, or a part of one; 0 = it computes on the CPU."""
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    """How many replicas answer."""
    drain_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds a replica that is to go has for finishing its answers."""
    deploy_timeout_s: Annotated[float, OUTPUT_UNCHANGED, Field(gt=0)] = 300.0
    """Seconds until the endpoint must answer."""
    question: Annotated[str, OUTPUT_UNCHANGED] = "In the beginning"
    """What the endpoint is asked before it counts as served."""

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this host's programs reach the endpoint."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def __post_init__(self) -> None:
        """Refuse an endpoint that strangers could use or that listens where it was not told to."""
        if not self.is_on_loopback and self.api_key_env is None:
            allowed = "must be 127.0.0.1 while there is no api_key_env: anyone on the network could use the model"
            raise ConfigError("host", self.host, allowed, "set api_key_env, or listen on 127.0.0.1")
        if self.api_keys_file is not None and self.api_key_env is None:
            allowed = "must come with api_key_env, the key with which the job asks its question"
            raise ConfigError("api_keys_file", self.api_keys_file, allowed, "set api_key_env too")
        if self.ingress == "haproxy" and self.is_on_loopback:
            allowed = f"must be proxy with host {self.host}: HAProxy's statistics and metrics listen on all addresses"
            raise ConfigError("ingress", self.ingress, allowed, "use proxy, or open the host and close 8404 and 9101")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            name = "tls_key_file" if self.tls_key_file is None else "tls_cert_file"
            raise ConfigError(name, "missing", "must be given with its other half", "name both files or none")
        if self.tls_name is not None and self.tls_cert_file is None:
            raise ConfigError("tls_name", self.tls_name, "has no effect without tls_cert_file", "remove it")
        if self.ingress == "haproxy" and self.tls_cert_file is not None:
            allowed = "must be absent with ingress haproxy, which would serve plain HTTP all the same (ray#64260)"
            raise ConfigError("tls_cert_file", self.tls_cert_file, allowed, "end TLS in front of it, or use proxy")
        object.__setattr__(self, "safety", self.safety.resolved("off" if self.is_on_loopback else "both"))
