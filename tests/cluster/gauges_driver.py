"""A driver that sets the training gauges of two runs, one of which has failed numerically, until it is ended.

python -m tests.cluster.gauges_driver ADDRESS
"""

import math
import sys
import time

import ray
from ray.util.metrics import Gauge

NAMES = (
    "loss",
    "validation_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "goodput",
    "lost_s",
    "restarts",
    "max_violation",
    "memory_bytes",
    "step",
    "tokens",
    "world_size",
    "loss_scale",
    "checkpoint_s",
)
"""What training measures, in Prometheus `ray_ds_train_` and then these: Ray puts `ray_` before a gauge's name."""
BAD = {"loss": math.nan, "goodput": 0.2, "max_violation": 5.0}
"""Of the run that has failed; Ray leaves out what is no number."""


@ray.remote(num_cpus=0)
class Idle:
    """An actor to be counted."""

    def ready(self) -> bool:
        """Tell that it is there."""
        return True


def main() -> None:
    """Set every gauge again and again."""
    ray.init(sys.argv[1], log_to_driver=False)
    gauges = {name: Gauge(f"ds_train_{name}", description=name, tag_keys=("run",)) for name in NAMES}
    actor = Idle.remote()
    assert ray.get(actor.ready.remote())
    step = 0
    while True:
        step += 1
        for position, name in enumerate(NAMES):
            value = float(step) if name == "step" else 0.5 + position
            gauges[name].set(value, tags={"run": "good"})
            gauges[name].set(BAD.get(name, value), tags={"run": "bad"})
        time.sleep(0.5)


if __name__ == "__main__":
    main()
