"""`ray-ds keys new NAME --file FILE`: its options, and what it prints."""

import argparse
from dataclasses import fields
from pathlib import Path

from ray_ds.config.keys import ApiKey
from ray_ds.serve.keys import new_key

LIMITS = tuple(field.name for field in fields(ApiKey) if field.name != "sha256")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a key, print it once, and append its hash to a file")
    new.add_argument("name", help="whose it is: letters, digits, - and _")
    new.add_argument("--file", required=True, help="the recipe's api_keys_file; deleting a line revokes its key")
    for limit in LIMITS:
        new.add_argument(f"--{limit.replace('_', '-')}", type=int, metavar="N", help="most that the key allows")


def run_keys(options: argparse.Namespace) -> list[str]:
    """Do what the options say and return the lines to print: the key alone, for scripts.

    Raises:
        UserError: the name is taken, a limit is wrong, or the file cannot be used.
    """
    limits = {limit: value for limit in LIMITS if (value := getattr(options, limit)) is not None}
    return [new_key(Path(options.file), options.name, limits)]
