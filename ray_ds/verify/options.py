"""The arguments of `ray-ds verify` and of its job; needs no Ray."""

import argparse
from dataclasses import dataclass

from ray_ds.errors import ConfigError

LEAST_TIMEOUT_S = 60.0
TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """What a verification was asked for."""

    run_dir: str
    only: tuple[str, ...]
    skip: tuple[str, ...]
    gpus: int | None
    """None = all there are."""
    timeout_s: float

    def arguments(self) -> list[str]:
        """Return the options as the job's arguments."""
        names = {"--only": ",".join(self.only), "--skip": ",".join(self.skip)}
        chosen = [part for option, value in names.items() if value for part in (option, value)]
        gpus = "auto" if self.gpus is None else str(self.gpus)
        return ["--run_dir", self.run_dir, *chosen, "--gpus", gpus, "--timeout-s", f"{self.timeout_s:g}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options."""
    parser.add_argument("--run_dir", required=True, help="folder or URI that every node reaches, for runs to come")
    parser.add_argument("--only", default="", metavar="NAMES", help="checks to run, with commas between them")
    parser.add_argument("--skip", default="", metavar="NAMES", help="checks to leave out, with commas between them")
    parser.add_argument("--gpus", default="auto", help="GPUs to use: auto for all, 0 for none (default %(default)s)")
    parser.add_argument(
        "--timeout-s", type=float, default=TIMEOUT_S, help="longest that all of it takes (default %(default)g)"
    )


def read_options(given: argparse.Namespace) -> VerifyOptions:
    """Return the options as they were given.

    Raises:
        ConfigError: one is wrong.
    """
    if given.gpus != "auto" and not given.gpus.isdigit():
        raise ConfigError("--gpus", given.gpus, "must be auto or a whole number", "correct it")
    if given.timeout_s < LEAST_TIMEOUT_S:
        raise ConfigError("--timeout-s", given.timeout_s, f"must be at least {LEAST_TIMEOUT_S:g}", "raise it")
    return VerifyOptions(
        run_dir=given.run_dir,
        only=_names(given.only),
        skip=_names(given.skip),
        gpus=None if given.gpus == "auto" else int(given.gpus),
        timeout_s=given.timeout_s,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
