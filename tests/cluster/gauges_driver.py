"""A driver that sets the training gauges of two runs, one of which has failed numerically, until it is ended.

python -m tests.cluster.gauges_driver ADDRESS
"""

import math
import sys
import time

import ray

from ray_ds.on_ray.gauges import TrainGauges
from ray_ds.train.metrics import FIELDS

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
    good, bad = TrainGauges("good"), TrainGauges("bad")
    actor = Idle.remote()
    assert ray.get(actor.ready.remote())
    step = 0
    while True:
        step += 1
        record = {**dict.fromkeys(FIELDS, 0.5), "step": float(step)}
        good.show(record)
        bad.show({**record, **BAD})
        time.sleep(0.5)


if __name__ == "__main__":
    main()
