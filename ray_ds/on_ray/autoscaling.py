"""Serve's form of the autoscaling settings."""

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.on_ray.token_load_policy import TokenLoadPolicy

METRICS_INTERVAL_S = 0.5
"""How often replicas and proxies report."""
LOOK_BACK_S = 5.0
"""Over how long the reports reach, and Serve's own counts are averaged."""


def autoscaling_config(settings: ServeSettings) -> AutoscalingConfig:
    """Return Serve's form of the settings.

    Delays of the policy `tokens` are the policy's own: Serve's would come on top of them.
    """
    scaling = settings.autoscaling
    bounds = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas}
    reports = {"metrics_interval_s": METRICS_INTERVAL_S, "look_back_period_s": LOOK_BACK_S}
    if scaling.policy == "tokens":
        policy = AutoscalingPolicy(policy_function=TokenLoadPolicy, policy_kwargs=_targets(settings))
        return AutoscalingConfig(**bounds, **reports, policy=policy, upscale_delay_s=0.0, downscale_delay_s=0.0)
    return AutoscalingConfig(**bounds, **reports, **_stock_rules(scaling))


def _targets(settings: ServeSettings) -> dict[str, float | int | None]:
    """Return the fields of `ScalingTargets`."""
    scaling = settings.autoscaling
    to_zero = scaling.downscale_to_zero_delay_s
    return {
        "max_running_requests": settings.max_running_requests,
        "target_utilization": scaling.target_utilization,
        "target_ttft_s": scaling.target_ttft_s,
        "hysteresis": scaling.hysteresis,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "downscale_to_zero_delay_s": scaling.downscale_delay_s if to_zero is None else to_zero,
    }


def _stock_rules(scaling: AutoscalingSettings) -> dict[str, float]:
    """Return what Serve's own policy goes by; nothing where the number is fixed."""
    names = ("target_ongoing_requests", "upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
    return {name: value for name in names if (value := getattr(scaling, name)) is not None}
