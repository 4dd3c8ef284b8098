"""Settings of the serve stage."""

from typing import Annotated, Literal

from pydantic import Field

from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.errors import ConfigError

SCALING_DEFAULTS = {"target_ongoing_requests": 4.0, "upscale_delay_s": 5.0, "downscale_delay_s": 60.0}
"""What is in force where `max_replicas` is above `min_replicas`."""

Exactness = Literal["none", "batch", "schedule"]
"""What an answer's bits do not depend on; see `ServeSettings.exactness`."""


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
    """Address the HTTP proxy listens on, on the head node; 0.0.0.0 = all of them, for which an API key is a must."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the HTTP proxy, one for all applications of a cluster."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the API key, read by the job; None = open to all who reach the port."""
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

    def __post_init__(self) -> None:
        """Refuse an endpoint that is open to the network without a key, and a cache that a request cannot fit in."""
        fill_or_refuse(self, "exactness", "none" if self.gpus_per_replica else "schedule", unused=None)
        if self.cache_tokens is not None and self.max_model_len is not None and self.cache_tokens < self.max_model_len:
            allowed = f"must be at least max_model_len ({self.max_model_len}), or the longest request cannot run"
            raise ConfigError("cache_tokens", self.cache_tokens, allowed, "raise it, or lower max_model_len")
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.api_key_env is None:
            allowed = "must be 127.0.0.1 while there is no api_key_env: anyone on the network could use the model"
            raise ConfigError("host", self.host, allowed, "set api_key_env, or listen on 127.0.0.1")
