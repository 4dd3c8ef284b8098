"""The floors of the house: what may import what, read from the source without running it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ray_ds"

FLOORS = {
    "__init__": 0,
    "errors": 0,
    "logs": 0,
    "object_store": 0,
    "storage": 0,
    "config": 1,
    "artifacts": 1,
    "recipe": 1,
    "stage_run": 1,
    "stage_table": 1,
    "steps": 1,
    "tokenizer_files": 1,
    "plan": 2,
    "tokenizer": 2,
    "chat": 2,
    "data": 2,
    "model": 2,
    "train": 2,
    "evaluate": 2,
    "exchange": 2,
    "quantize": 2,
    "serve": 2,
    "on_ray": 3,
    "stages": 4,
    "report": 5,
    "submit": 5,
    "pipeline": 5,
    "verify": 5,
    "commands": 5,
    "job": 5,
    "cli": 5,
}
SIDEWAYS = {
    ("train", "model"),
    ("train", "data"),
    ("train", "chat"),
    ("evaluate", "chat"),
    ("evaluate", "model"),
    ("evaluate", "tokenizer"),
    ("evaluate", "data"),
    ("evaluate", "quantize"),
    ("quantize", "model"),
    ("quantize", "data"),
    ("quantize", "evaluate"),
    ("exchange", "model"),
    ("plan", "model"),
    ("exchange", "tokenizer"),
    ("serve", "model"),
    ("serve", "quantize"),
    ("serve", "tokenizer"),
    ("data", "tokenizer"),
    ("data", "chat"),
    ("chat", "tokenizer"),
    ("serve", "chat"),
    ("serve", "data"),
}
PLACES = {
    "ray": ("on_ray/", "stages/", "submit.py", "verify/"),
    "deepspeed": ("train/zero/",),
    "fastapi": ("serve/http/",),
    "grpc": ("serve/grpc/",),
}
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: str) -> set[str]:
    """Return the dotted modules a source file imports; `from ray_ds import storage` counts as ray_ds.storage."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "ray_ds" else {module}
    return found


def place(module: str) -> str:
    """Return the top-level part of the package that a dotted module or a path belongs to."""
    return module.removesuffix(".py").replace("/", ".").split(".")[0]


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_down(path: str) -> None:
    here = place(path)
    for module in imports(path):
        if module.startswith("ray_ds."):
            there = place(module.removeprefix("ray_ds."))
            if there not in FLOORS:  # a name of the package itself, such as __version__
                continue
            lower = FLOORS[there] < FLOORS[here] or (FLOORS[here] in (0, 1, 5) and FLOORS[there] == FLOORS[here])
            assert there == here or lower or (here, there) in SIDEWAYS, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES)
def test_third_party_imports_stay_in_their_place(path: str) -> None:
    for module in imports(path):
        allowed = PLACES.get(module.split(".")[0])
        assert allowed is None or path.startswith(allowed), f"{path} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if FLOORS[place(path)] <= 1])
def test_low_floors_need_no_heavy_package(path: str) -> None:
    import sys

    for module in imports(path):
        top = module.split(".")[0]
        assert top in {"ray_ds", "pydantic", "pyarrow"} | sys.stdlib_module_names, f"{path} imports {module}"


def test_help_loads_no_heavy_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys, ray_ds.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")
