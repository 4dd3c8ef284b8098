"""The figures of training as Prometheus sees them, through Ray's own endpoint on each node."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from ray_ds.train.metrics import FIELDS

_RAY = "ray_"
"""Ray puts it before every name."""
_PREFIX = "ds_train_"
GAUGES = (
    "ray_ds_train_step",
    "ray_ds_train_tokens",
    "ray_ds_train_loss",
    "ray_ds_train_validation_loss",
    "ray_ds_train_lr",
    "ray_ds_train_grad_norm",
    "ray_ds_train_tokens_per_s",
    "ray_ds_train_mfu",
    "ray_ds_train_goodput",
    "ray_ds_train_lost_s",
    "ray_ds_train_restarts",
    "ray_ds_train_world_size",
    "ray_ds_train_max_violation",
    "ray_ds_train_memory_bytes",
    "ray_ds_train_checkpoint_s",
    "ray_ds_train_loss_scale",
)
"""Names in Prometheus; each is a figure of `FIELDS`. All are gauges, also what only grows: a new driver goes on with
the run's true count, where a counter would start from 0."""


class TrainGauges:
    """Shows the last reported step; for the process that drives training, which Ray forgets when it ends."""

    def __init__(self, run: str) -> None:
        """Make the gauges; a connected process is wanted.

        Args:
            run: value of the label `run`, such as the recipe's step and the digest's beginning.
        """
        self._gauges = {name: _make_gauge(name, run) for name in map(_field, GAUGES)}

    def show(self, record: Mapping[str, float]) -> None:
        """Take over what a record has; other gauges keep their value."""
        for name, gauge in self._gauges.items():
            if name in record:
                gauge.set(float(record[name]))


def _field(gauge: str) -> str:
    """Return the figure that a gauge shows."""
    return gauge.removeprefix(_RAY + _PREFIX)


def _make_gauge(field: str, run: str) -> Gauge:
    gauge = Gauge(_PREFIX + field, description=FIELDS[field], tag_keys=("run",))
    return gauge.set_default_tags({"run": run})
