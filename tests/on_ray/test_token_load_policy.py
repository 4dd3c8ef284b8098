import os

os.environ["RAY_AUTH_MODE"] = "disabled"

from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from ray_ds.on_ray.token_load_policy import STALE_S, TokenLoadPolicy
from ray_ds.serve.scaling.load import METRICS

DEPLOYMENT = DeploymentID(name="model", app_name="app")
TARGETS = {
    "max_running_requests": 10,
    "target_utilization": 0.5,
    "target_ttft_s": 1.0,
    "hysteresis": 0.2,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "downscale_to_zero_delay_s": 0.0,
}
NOW_S = 1000.0


def context(
    running: dict[str, int | None], *, target: int, age_s: float = 0.5, queued: float = 0.0, counted: float = 0.0
) -> AutoscalingContext:
    """Return what Serve hands a policy; None for a replica that reports nothing."""
    ids = {name: ReplicaID(name, DEPLOYMENT) for name in running}
    values = {name: 0.0 for name in METRICS} | {"num_cache_tokens": 1000.0}
    raw = {
        metric: {
            ids[name]: [TimeStampedValue(NOW_S - age_s, float(count) if metric == "num_running" else value)]
            for name, count in running.items()
            if count is not None
        }
        for metric, value in values.items()
    }
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="model",
        app_name="app",
        current_num_replicas=len(running),
        target_num_replicas=target,
        running_replicas=list(ids.values()),
        total_num_requests=lambda: counted,
        total_queued_requests=lambda: queued,
        aggregated_metrics=dict,
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW_S,
        config=None,
    )


def decide(asked: AutoscalingContext) -> int:
    """Return what the policy says when it is asked a few times in a row, as Serve does."""
    policy = TokenLoadPolicy(**TARGETS)
    for i in range(3):
        asked.current_time = NOW_S + i / 10
        wanted, state = policy(asked)
        assert state == {}
    return wanted


def test_the_number_follows_what_replicas_report() -> None:
    assert decide(context({"a": 6, "b": 5}, target=2)) == 3


def test_serves_own_count_of_open_requests_is_not_believed() -> None:
    assert decide(context({"a": 0, "b": 0}, target=2, counted=50.0)) < 2


def test_queued_requests_are_seen() -> None:
    assert decide(context({"a": 0}, target=1, queued=11.0)) == 3


def test_a_silent_replica_keeps_all_and_adds_none() -> None:
    assert decide(context({"a": 0, "b": None, "c": None}, target=3)) == 3
    assert decide(context({"a": None}, target=4)) == 4
    assert decide(context({}, target=1)) == 1


def test_an_old_report_says_nothing() -> None:
    assert decide(context({"a": 90}, target=1, age_s=STALE_S + 1)) == 1
    assert decide(context({"a": 90}, target=1, age_s=STALE_S - 1)) == 18
