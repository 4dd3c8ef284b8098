"""The README tells the truth: its commands exist, its tables are those of the code, and it is short."""

import re
import shlex
from pathlib import Path

import pytest

from ray_ds.cli import argument_parser
from ray_ds.recipe import load_recipe
from ray_ds.stage_table import STAGES
from tests.capabilities import TABLE, marked_tests, table
from tests.readme import README, commands

PROJECT = README.parent


def words_of(program: str) -> list[list[str]]:
    """Return the words of every README command that starts with `program`."""
    return [words for command in commands() if (words := shlex.split(command)) and words[0] == program]


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_table_of_capabilities_is_the_tests() -> None:
    assert table() == TABLE.read_text(), "run `python -m tests.capabilities`"
    assert len({sentence for sentence, _ in marked_tests()}) >= 12


def test_the_table_of_jobs_is_the_table_of_stages() -> None:
    for stage in STAGES:
        reads = " + ".join(" or ".join(group) for group in stage.reads) or "raw files"
        assert f"| `{stage.job}` | {reads} | {stage.writes} | {stage.resources} |" in README.read_text()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"setup", "demo", "test", "check", "fmt", "bench", "up", "down", "clean", "help"} <= targets
    named = {words[1] for words in words_of("make")}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("words", words_of("ray-ds"), ids=" ".join)
def test_ray_ds_commands_parse(words: list[str]) -> None:
    options, overrides = argument_parser().parse_known_args(words[1:])
    if getattr(options, "recipe", None):
        load_recipe(str(PROJECT / options.recipe), overrides=overrides, root=str(PROJECT))


def test_job_commands_name_jobs_that_exist() -> None:
    submitted = words_of("ray")
    assert submitted
    for words in submitted:
        module = words[words.index("-m") + 1]
        assert (PROJECT / Path(*module.split("."))).with_suffix(".py").is_file()


def test_the_layout_names_what_exists() -> None:
    tree = README.read_text().split("## The tree")[1]
    for name in re.findall(r"^  ((?:[\w/]+\.py ?|[\w]+/ ?)+)", tree, flags=re.MULTILINE):
        for part in name.split():
            assert (PROJECT / "ray_ds" / part).exists(), part


def test_ci_calls_the_test_command() -> None:
    assert "make test" in (PROJECT / ".ci/run").read_text()
