"""`ray-ds plan`: its options, and what it prints."""

import argparse
from collections.abc import Callable

from ray_ds.config.train import TrainSettings
from ray_ds.errors import ConfigError, UserError
from ray_ds.plan.devices import DEVICE_KINDS, GPUS_PER_NODE, NETWORK_GBIT_PER_S, Fleet, find_kind
from ray_ds.plan.fit import check_fits
from ray_ds.plan.report import Budget, plan_lines
from ray_ds.plan.steps import step_case, train_steps
from ray_ds.recipe import Recipe

ClusterFleet = Callable[[TrainSettings], Fleet]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    kinds = ", ".join(kind.name for kind in DEVICE_KINDS)
    parser.add_argument("--step", help="which train step (default: all of them)")
    parser.add_argument("--gpu", help=f"kind of GPU: {kinds} (default: what the cluster has)")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many train (default: the step's num_workers)")
    text = "GPUs of a node, joined by NVLink or PCIe, with --gpu (default %(default)s)"
    parser.add_argument("--gpus-per-node", type=int, default=GPUS_PER_NODE, metavar="N", help=text)
    text = "a GPU's share of its node's network, with --gpu (default %(default)g, assumed)"
    parser.add_argument("--network-gbit", type=float, default=NETWORK_GBIT_PER_S, metavar="GBIT", help=text)
    parser.add_argument("--gpu-hour-price", type=float, metavar="PRICE", help="of one GPU hour; without it no cost")


def run_plan(recipe: Recipe, options: argparse.Namespace, cluster_fleet: ClusterFleet) -> int:
    """Print the plan of each train step and return the exit status.

    Args:
        cluster_fleet: returns the machines of the cluster at hand for a step; called only where no GPU is named.
    Raises:
        UserError: what a step asks for cannot fit; its plan has been printed.
    """
    refusals: list[UserError] = []
    for name in ("gpus", "gpus_per_node", "network_gbit", "gpu_hour_price"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be positive", "raise it")
    for step in train_steps(recipe, options.step):
        settings: TrainSettings = step.settings
        fleet = _named_fleet(options, settings) if options.gpu else cluster_fleet(settings)
        case = step_case(step, options.gpus)
        size = case.parallel.group_size
        if case.world_size % size:
            allowed = f"must be whole groups of {size}, the product of {step.name}.parallel"
            raise ConfigError("--gpus", case.world_size, allowed, f"try {-(-case.world_size // size) * size}")
        most = settings.num_micro_batches * case.parallel.rows_shared_by
        if case.world_size > most:
            together = f" times {case.parallel.rows_shared_by}" if case.parallel.rows_shared_by > 1 else ""
            allowed = f"must be at most {most}, the micro-batches of a step of {step.name}{together}"
            action = f"lower --{step.name}.micro_batch, raise --{step.name}.batch_tokens, or use fewer"
            raise ConfigError("--gpus", case.world_size, allowed, action)
        tokens = settings.num_steps * settings.batch_tokens
        budget = Budget(tokens=tokens, steps=settings.num_steps, gpu_hour_price=options.gpu_hour_price)
        print("\n".join(plan_lines(step.name, case, fleet, budget)), flush=True)
        print(flush=True)
        try:
            check_fits(case, fleet, step=step.name)
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return 0


def _named_fleet(options: argparse.Namespace, settings: TrainSettings) -> Fleet:
    return Fleet(
        kind=find_kind(options.gpu),
        num_devices=options.gpus or settings.max_workers,
        devices_per_node=options.gpus_per_node,
        network_gbit_per_s=options.network_gbit,
    )
