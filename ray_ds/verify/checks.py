"""The table of checks, in the order in which they run, and choosing among them."""

from collections.abc import Sequence

from ray_ds.errors import ConfigError
from ray_ds.verify.changes import check_join, check_kill
from ray_ds.verify.collectives import check_collectives
from ray_ds.verify.data import check_data
from ray_ds.verify.node_health import check_nodes
from ray_ds.verify.node_settings import check_settings
from ray_ds.verify.runner import Check
from ray_ds.verify.serving import check_serving
from ray_ds.verify.shared_storage import check_storage
from ray_ds.verify.training import check_training
from ray_ds.verify.versions import check_versions

CHECKS: tuple[Check, ...] = (
    Check(name="versions", run=check_versions, limit_s=120, shows="the same packages on every node"),
    Check(name="nodes", run=check_nodes, limit_s=90, shows="build locks, limits, disk space and clocks"),
    Check(name="settings", run=check_settings, limit_s=60, shows="how Ray was started"),
    Check(name="storage", run=check_storage, limit_s=150, shows="every node writes and reads in the run directory"),
    Check(name="collectives", run=check_collectives, limit_s=240, shows="process groups over all nodes and GPUs"),
    Check(name="data", run=check_data, limit_s=240, shows="clean and tokenize give the same bytes on any CPUs"),
    Check(name="training", run=check_training, limit_s=400, shows="the same losses with any number of workers"),
    Check(name="kill", run=check_kill, limit_s=180, shows="training goes on when a worker is killed"),
    Check(name="join", run=check_join, limit_s=180, shows="training grows when there is more room"),
    Check(name="serving", run=check_serving, limit_s=210, shows="a model answers and scales to two replicas"),
)


def choose_checks(only: Sequence[str], skip: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks that are named, or all, without those to skip.

    Raises:
        ConfigError: there is no check of such a name, or none is left.
    """
    names = [check.name for check in CHECKS]
    for option, given in (("--only", only), ("--skip", skip)):
        for name in given:
            if name not in names:
                raise ConfigError(option, name, f"must be some of {', '.join(names)}", "correct it")
    chosen = tuple(check for check in CHECKS if check.name in (only or names) and check.name not in skip)
    if not chosen:
        raise ConfigError("--skip", ",".join(skip), "must leave a check to run", "skip fewer")
    return chosen
