"""The command `ray-ds`: its commands are in `commands/`, a module a group."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ray_ds import __version__
from ray_ds.commands import artefacts, cluster, endpoint, keys, quantized, recipes, samples
from ray_ds.config.arguments import ArgumentParser
from ray_ds.errors import ConfigError
from ray_ds.job import exit_status


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `ray-ds` and exit: 0 done, 1 failed, 2 a user's mistake, 75 broken off: submit again to go on."""
    sys.exit(exit_status(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments)))


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of `ray-ds`."""
    parser = ArgumentParser(prog="ray-ds", description="From raw text to a served language model on a Ray cluster.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(takes_overrides=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    for group in (recipes, artefacts, quantized, endpoint, keys, cluster, samples):
        group.add_commands(commands.add_parser)
    return parser


def _dispatch(arguments: Sequence[str]) -> int:
    options, overrides = argument_parser().parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        raise ConfigError("arguments", overrides[0], "must fit the usage", f"see ray-ds {options.command} --help")
    options.overrides = overrides
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)
