"""Reading the README's commands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def shell_blocks() -> list[list[str]]:
    """Return the commands of each ```sh block: comments removed, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [
        [
            command
            for line in block.replace("\\\n", " ").splitlines()
            if (command := re.sub(r"\s+#.*", "", line).strip())
        ]
        for block in blocks
    ]


def commands() -> list[str]:
    """Return all commands of the README."""
    return [command for block in shell_blocks() for command in block]
