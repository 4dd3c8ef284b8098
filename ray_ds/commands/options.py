"""What several commands have in common: arguments, and how they are read."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_ds.recipe import Recipe, load_recipe

AddParser = Callable[..., argparse.ArgumentParser]
"""Adds a command: `add("status", help="show the steps")` returns its parser, which must `set_defaults(run=...)`.

`run` is called with the options and returns the exit status; `options.overrides` is what the parser did not know.
"""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Let a command take a recipe with overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file; then overrides like --train.steps=100")
    text = "folder that relative paths in the recipe are below (default: this one)"
    parser.add_argument("--root", type=_absolute, default=".", help=text)
    parser.set_defaults(takes_overrides=True)


def read_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that was given, with its overrides.

    Raises:
        ConfigError: it is wrong.
    """
    return load_recipe(options.recipe, overrides=options.overrides, root=options.root)


def whole_number(text: str) -> int:
    """Return a whole number that is not negative."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def print_lines(lines: Sequence[str]) -> int:
    """Print them and return 0."""
    print("\n".join(lines))
    return 0


def _absolute(folder: str) -> str:
    return str(Path(folder).resolve())
