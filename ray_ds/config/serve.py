"""Settings of the serve stage."""

from typing import Annotated, Literal

from pydantic import Field

from ray_ds.config.safety import SafetySettings
from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.errors import ConfigError

ABSOLUTE_PATH = r"^/"

SCALING_DEFAULTS = {"policy": "tokens", "upscale_delay_s": 1.0, "downscale_delay_s": 60.0}
"""What is in force where `max_replicas` is above `min_replicas`."""
TOKENS_DEFAULTS = {"target_utilization": 0.6, "target_ttft_s": 1.0, "hysteresis": 0.4}
"""What is in force where `policy` is `tokens`."""

Exactness = Literal["none", "batch", "schedule"]
"""What an answer's bits do not depend on; see `ServeSettings.exactness`."""


@settings
class AutoscalingSettings:
    """How many replicas answer; what says when their number changes must be left out where it cannot."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Replicas that are always there. 0 = none without requests: the first after a pause waits for one to start, and
    every request starts one, `/health` too; a probe asks the proxy's own `/-/healthz`."""
    max_replicas: Annotated[int, Field(ge=1)] = 2
    """Replicas there may be under load; no more than the cluster has room for ever start."""
    policy: Literal["tokens", "ongoing_requests"] | None = None
    """What the number follows: `tokens` = what engines report of places, cache, prompts and predicted time to first
    token; `ongoing_requests` = Ray Serve's own count of open requests; absent = tokens."""
    target_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """For `tokens`: part of `max_running_requests`, of the cache and of the time for prompts that a replica should use:
    what is left takes the load until another one has started; absent = 0.6."""
    target_ttft_s: Annotated[float, Field(gt=0)] | None = None
    """For `tokens`: predicted seconds to a new request's first token above which there are too few replicas;
    absent = 1."""
    hysteresis: Annotated[float, Field(ge=0, lt=1)] | None = None
    """For `tokens`: part of the targets that those who stay must have to spare before a replica is taken away;
    absent = 0.4, with which chance crowds of requests moved no replica in the simulator."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    """For `ongoing_requests`: requests a replica should have at a time: with more on average one is added, with fewer
    one is taken away; absent = 4."""
    upscale_delay_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds of too much load before replicas are added; absent = 1."""
    downscale_delay_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds of too little load before replicas are taken away; absent = 60."""
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] | None = None
    """With min_replicas = 0: seconds without a request before the last replica is taken away; absent = 300, as starting
    it again makes somebody wait."""

    def __post_init__(self) -> None:
        """Refuse ranges without a number in them, and rules that would never be used."""
        if self.max_replicas < self.min_replicas:
            allowed = f"must be at least min_replicas ({self.min_replicas})"
            raise ConfigError("max_replicas", self.max_replicas, allowed, "raise it")
        is_fixed = self.max_replicas == self.min_replicas
        fixed = f"has no effect while min_replicas = max_replicas = {self.min_replicas}" if is_fixed else None
        for name, default in SCALING_DEFAULTS.items():
            fill_or_refuse(self, name, default, unused=fixed)
        no_tokens = None if self.policy == "tokens" else "has no effect unless policy is tokens"
        for name, target in TOKENS_DEFAULTS.items():
            fill_or_refuse(self, name, target, unused=fixed or no_tokens)
        no_requests = None if self.policy == "ongoing_requests" else "has no effect unless policy is ongoing_requests"
        fill_or_refuse(self, "target_ongoing_requests", 4.0, unused=fixed or no_requests)
        never_zero = None if self.min_replicas == 0 else "has no effect unless min_replicas is 0"
        fill_or_refuse(self, "downscale_to_zero_delay_s", 300.0, unused=never_zero)


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
    grpc_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the gRPC proxy, with the methods of `ray_ds.Generation` and reflection; None = there is none. It listens
    on all addresses and without TLS, whatever `host` says: Ray has no setting for either."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds an API key without limits, read by the job, which asks its question with it; None
    = open to all who reach the port."""
    api_keys_file: Annotated[str, Field(pattern=ABSOLUTE_PATH)] | None = None
    """File of more API keys, hashed and with limits, which every node reads; `ray-ds keys new` writes it. A changed
    file is taken up within a second, without a restart."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of prompt and answer together; None = as many as the model was made for."""
    max_running_requests: Annotated[int, Field(ge=1)] = 8
    """Answers a replica writes at the same time."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait at a replica; more are refused with 429."""
    max_queued_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens that may wait at a replica; a request that finds none is always taken. None = any number."""
    cache_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens the cache has room for, at least `max_model_len`; when it is full, the youngest answer stops and is read
    again later. None = max_running_requests * max_model_len, so that none ever has to."""
    cache_block_tokens: Literal[16, 32, 64] = 32
    """Tokens of a block of the cache: what answers reserve and share."""
    reuse_prefixes: bool = True
    """Whether a prompt that begins as one before it takes what is still in the cache."""
    step_tokens: Annotated[int, Field(ge=16)] = 512
    """Tokens that a step computes, about; longer prompts are read in parts, so that they delay other answers little."""
    exactness: Exactness | None = None
    """What the last bits of tokens and log-probabilities follow from. `schedule`: from the request and its seed alone.
    `batch`: not from what else is answered, but from whether a prefix was in the cache or an answer had to stop;
    prompts are read faster. `none`: also from the batch, in the fastest kernels. The first two hold for one thread
    (`cpus_per_replica`): several end vector loops in the middle of rows. Absent = `schedule` on a CPU, `none` on a
    GPU."""
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
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """While a model is replaced: replicas of the new one that may run beside all of the old one, as a part of their
    number; the old ones go as the new ones answer. 0 = the old ones go first: requests wait, but the cluster needs no
    room for both."""
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
        """Refuse an endpoint that strangers could use, ports nobody asked for, and a cache too small for a request."""
        fill_or_refuse(self, "exactness", "none" if self.gpus_per_replica else "schedule", unused=None)
        if self.cache_tokens is not None and self.max_model_len is not None and self.cache_tokens < self.max_model_len:
            allowed = f"must be at least max_model_len ({self.max_model_len}), or the longest request cannot run"
            raise ConfigError("cache_tokens", self.cache_tokens, allowed, "raise it, or lower max_model_len")
        if not self.is_on_loopback and self.api_key_env is None:
            allowed = "must be 127.0.0.1 while there is no api_key_env: anyone on the network could use the model"
            raise ConfigError("host", self.host, allowed, "set api_key_env, or listen on 127.0.0.1")
        if self.api_keys_file is not None and self.api_key_env is None:
            allowed = "must come with api_key_env, the key with which the job asks its question"
            raise ConfigError("api_keys_file", self.api_keys_file, allowed, "set api_key_env too")
        if self.grpc_port is not None and (self.is_on_loopback or self.tls_cert_file is not None):
            other = f"host {self.host}" if self.is_on_loopback else "tls_cert_file"
            allowed = f"must be absent with {other}: Ray's gRPC proxy listens on all addresses and without TLS"
            raise ConfigError("grpc_port", self.grpc_port, allowed, "remove it, or open the host, with TLS in front")
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
