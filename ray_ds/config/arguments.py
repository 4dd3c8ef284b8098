"""Command lines whose mistakes are told like those in settings."""

import argparse
from typing import NoReturn

from ray_ds.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises a `ConfigError` for bad arguments, where argparse would print its own words and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ConfigError("arguments", message, "must fit the usage", self.format_usage().strip())
