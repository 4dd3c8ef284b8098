"""The README's commands, run: those for a step, on the small recipe."""

import subprocess

import pytest

from tests.end_to_end.conftest import Site
from tests.readme import shell_blocks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STEP_COMMANDS = next(block for block in shell_blocks() if any("ray job submit" in command for command in block))


def test_there_are_commands() -> None:
    assert len(STEP_COMMANDS) >= 8


@pytest.mark.parametrize("command", [c for c in STEP_COMMANDS if not c.startswith("source")])
def test_command(site: Site, finished: subprocess.CompletedProcess[str], command: str) -> None:
    adapted = command.replace("demo.toml", "mini.toml").replace("runs/demo", "runs/mini")
    if adapted.startswith("ray-ds generate"):
        adapted += f" --url http://127.0.0.1:{site.port}"
    result = site.run("bash", "-c", adapted)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.strip() or "sample-text" in command
