"""The table of capabilities, made from the tests marked `shows`: `python -m tests.capabilities` writes it.

A test says `@pytest.mark.shows("what a user can rely on")`; the table has a row a sentence, with the tests behind it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS / "CAPABILITIES.md"
HEAD = """# What you can rely on

Each line is shown by a test of `make test`. Written by `python -m tests.capabilities`.
"""


def marked_tests() -> Iterator[tuple[str, str]]:
    """Yield (sentence, path of the test file) of every marked test, in the order of files and lines."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for sentence in _sentences(node):
                    yield sentence, path.relative_to(TESTS.parent).as_posix()


def _sentences(test: ast.FunctionDef) -> Iterator[str]:
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.shows":
            yield ast.literal_eval(mark.args[0])


def table() -> str:
    """Return the table in Markdown."""
    files: dict[str, list[str]] = {}
    for sentence, path in marked_tests():
        if path not in files.setdefault(sentence, []):
            files[sentence].append(path)
    rows = [f"| {sentence} | {', '.join(f'`{path}`' for path in paths)} |" for sentence, paths in files.items()]
    return "\n".join([HEAD, "| what you can rely on | shown by |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    TABLE.write_text(table())
