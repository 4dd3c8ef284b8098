import os

os.environ["RAY_AUTH_MODE"] = "disabled"

from ray.serve.config import AutoscalingPolicy

from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.on_ray.autoscaling import autoscaling_config
from ray_ds.on_ray.token_load_policy import TokenLoadPolicy


def test_our_policy_gets_the_settings_and_serve_adds_no_delay_of_its_own() -> None:
    scaling = AutoscalingSettings(min_replicas=2, max_replicas=5, target_ttft_s=0.5, downscale_delay_s=30.0)
    config = autoscaling_config(ServeSettings(autoscaling=scaling, max_running_requests=3))
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0.0, 0.0, None)
    assert config.policy.policy_kwargs == {
        "max_running_requests": 3,
        "target_utilization": 0.6,
        "target_ttft_s": 0.5,
        "hysteresis": 0.4,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 30.0,
        "downscale_to_zero_delay_s": 30.0,
    }
    assert config.look_back_period_s > config.metrics_interval_s, "else a window is a single report"


def test_a_policy_made_by_serve_from_what_it_stores_is_ours() -> None:
    policy = autoscaling_config(ServeSettings()).policy
    stored = AutoscalingPolicy.from_serialized_policy_def(
        {"policy_function": policy.policy_function, "policy_kwargs": policy.policy_kwargs},
        policy.get_serialized_policy_def(),
    )
    assert stored.get_policy().__name__ == TokenLoadPolicy.__name__
    assert callable(stored.get_policy()(**stored.policy_kwargs))


def test_serves_own_policy_is_left_as_it_is() -> None:
    scaling = AutoscalingSettings(
        policy="ongoing_requests", min_replicas=0, max_replicas=5, target_ongoing_requests=3.0
    )
    config = autoscaling_config(ServeSettings(autoscaling=scaling))
    assert config.policy.is_default_policy_function()
    assert (config.target_ongoing_requests, config.upscale_delay_s, config.downscale_delay_s) == (3.0, 1.0, 60.0)
    assert config.downscale_to_zero_delay_s == 300.0


def test_a_fixed_number_has_no_policy_of_ours() -> None:
    fixed = autoscaling_config(ServeSettings(autoscaling=AutoscalingSettings(min_replicas=3, max_replicas=3)))
    assert (fixed.min_replicas, fixed.max_replicas) == (3, 3)
    assert fixed.policy.is_default_policy_function()
