"""Commands on an endpoint's API keys."""

import argparse
from dataclasses import fields
from pathlib import Path

from ray_ds.commands.options import AddParser, print_lines
from ray_ds.config.arguments import ArgumentParser
from ray_ds.config.keys import ApiKey
from ray_ds.serve.keys import new_key

LIMITS = tuple(field.name for field in fields(ApiKey) if field.name != "sha256")


def add_commands(add: AddParser) -> None:
    """Add keys, with its action new."""
    keys = add("keys", help="make API keys for an endpoint")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=ArgumentParser)
    new = actions.add_parser("new", help="make a key, print it once, and append its hash to a file")
    new.add_argument("name", help="whose it is: letters, digits, - and _")
    new.add_argument("--file", required=True, help="the recipe's api_keys_file; deleting a line revokes its key")
    for limit in LIMITS:
        new.add_argument(f"--{limit.replace('_', '-')}", type=int, metavar="N", help="most that the key allows")
    new.set_defaults(run=_new)


def _new(options: argparse.Namespace) -> int:
    """Make a key and print it alone, for scripts."""
    limits = {limit: value for limit in LIMITS if (value := getattr(options, limit)) is not None}
    return print_lines([new_key(Path(options.file), options.name, limits)])
