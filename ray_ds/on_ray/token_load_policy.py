"""The autoscaling policy that Ray Serve's controller asks ten times a second.

Serve pickles this module by value and everything it imports by name, so the controller needs the installed package. It
makes one instance a deployment, a new one where the deployment's settings change or the controller comes back.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

from ray_ds.serve.scaling.load import window_of
from ray_ds.serve.scaling.rule import ScalingTargets, TokenLoadRule

STALE_S = 10.0
"""Age from which a replica's last report says nothing. Replicas report twice a second; clocks of nodes may differ."""


class TokenLoadPolicy:
    """Scales by what the replicas' engines report.

    Serve's own count of open requests is not used: it goes on counting streams that have ended (ray#61551).
    """

    def __init__(self, **targets: Any) -> None:
        """Take the fields of `ScalingTargets`, which Serve keeps as JSON."""
        self._rule = TokenLoadRule(ScalingTargets(**targets))

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be, and no state for Serve to keep."""
        reported: dict[Any, dict[str, list[tuple[float, float]]]] = {}
        for metric, replicas in (context.raw_metrics or {}).items():
            for replica, points in replicas.items():
                ends = [(point.timestamp, point.value) for point in [*points[:1], *points[-1:]]]
                reported.setdefault(replica, {})[metric] = ends
        now_s = context.current_time
        windows = [window_of(reported.get(replica, {})) for replica in context.running_replicas]
        fresh = [window for window in windows if window is not None and now_s - window.end_s < STALE_S]
        wanted = self._rule.decide(
            now_s, context.target_num_replicas, context.current_num_replicas, fresh, context.total_queued_requests
        )
        return wanted, {}
