"""The command that checks a cluster."""

import argparse
from collections.abc import Callable

from ray_ds.commands.options import AddParser
from ray_ds.stage_table import load_object
from ray_ds.verify.options import add_options


def add_commands(add: AddParser) -> None:
    """Add verify."""
    verify = add("verify", help="check a cluster, as a job of at most 15 minutes, and write a report")
    add_options(verify)
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    submit: Callable[[argparse.Namespace], int] = load_object("ray_ds.verify.submission:submit")
    return submit(options)
