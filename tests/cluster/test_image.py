"""The image: its Dockerfile is linted and read, and what it does to the package is done here for real."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_ds.stage_table import STAGES
from tests.cluster.cluster_files import DOCKERFILE, PROJECT, instructions

BIN = Path(sys.executable).parent
IGNORE_FILE = DOCKERFILE.with_name("Dockerfile.dockerignore")


def copied_sources() -> list[str]:
    """Return what the Dockerfile copies from the build context."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    return [word for words in copies for word in words[:-1] if not word.startswith("--")]


def fits(path: str, pattern: str) -> bool:
    """Tell whether a path fits a pattern whose stars cross no slash."""
    return re.fullmatch(pattern.replace("*", "[^/]*"), path) is not None


def run(command: Sequence[str], cwd: Path, **environment: str) -> str:
    """Run a command, with the import path and settings of this process left out, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of exactly the files that the first stage copies, and install it alone in an empty folder."""
    context = tmp_path_factory.mktemp("context")
    stages = DOCKERFILE.read_text().split("\nFROM ")
    (copy_lines,) = [stage for stage in stages if "AS wheel" in stage]
    for line in re.findall(r"^COPY (.*) \S+$", copy_lines, flags=re.MULTILINE):
        for name in line.split():
            source = PROJECT / name
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / name, ignore=ignore) if source.is_dir() else shutil.copy(source, context)
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    assert "pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ." in copy_lines
    run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), "."], context)
    (wheel,) = wheels.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    run([*pip, "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)], wheels)
    return folder


def test_the_linter_has_nothing_to_say() -> None:
    found = subprocess.run([str(BIN / "hadolint"), "--format", "json", str(DOCKERFILE)], capture_output=True, text=True)
    assert json.loads(found.stdout) == [] and found.returncode == 0


def test_the_linter_would_say_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("rsync wget", "rsync wget && cd /tmp").replace("CMD [", "CMDD ["))
    found = subprocess.run([str(BIN / "hadolint"), "--format", "json", str(bad)], capture_output=True, text=True)
    assert found.returncode != 0


def test_one_pinned_python_for_both_kinds_of_node() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    assert re.fullmatch(r"3\.11\.\d+-slim-[a-z]+", arguments["PYTHON"])
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert bases == ["python:${PYTHON}", "python:${PYTHON}", "node", "node", "node-${ACCELERATOR}"]
    stages = [rest.split()[-1] for word, rest in instructions() if word == "FROM"]
    assert {"node-cpu", "node-cuda"} <= set(stages) and arguments["ACCELERATOR"] == "cpu"


def test_it_runs_as_a_user_without_rights_and_holds_no_secret() -> None:
    last_user = [rest for word, rest in instructions() if word == "USER"][-1]
    assert last_user == "1000:1000" and "--uid 1000" in DOCKERFILE.read_text()
    for word, rest in instructions():
        assert not (word in ("ENV", "ARG") and re.search(r"TOKEN(_PATH)?=\S|PASSWORD|SECRET|API_KEY", rest)), rest


def test_the_build_context_holds_what_is_copied_and_little_else() -> None:
    first, *allowed = [line for line in IGNORE_FILE.read_text().splitlines() if line and not line.startswith("#")]
    assert first == "*"
    patterns = [line.removeprefix("!") for line in allowed if line.startswith("!")]
    sources = copied_sources()
    assert len(sources) >= 8
    for source in sources:
        assert list(PROJECT.glob(source)), source
        assert any(fits(source, pattern) for pattern in patterns), source
    for pattern in patterns:
        assert any(fits(source, pattern) for source in sources), pattern


def test_it_has_what_ray_up_and_kuberay_call() -> None:
    text = DOCKERFILE.read_text()
    for program in ("wget", "rsync", "openssh-client", "g++"):
        assert re.search(rf"apt-get install .*{re.escape(program)}", text), program


@pytest.mark.slow
def test_the_wheel_holds_all_that_a_node_needs(installed: Path, tmp_path: Path) -> None:
    ours = {path.relative_to(PROJECT) for path in (PROJECT / "ray_ds").rglob("*") if path.is_file()}
    wanted = {path for path in ours if "__pycache__" not in path.parts}
    assert {path for path in wanted if not (installed / path).is_file()} == set()
    where = run([sys.executable, "-c", "import ray_ds; print(ray_ds.__file__)"], tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    op = run(
        [sys.executable, "-m", "ray_ds.train.zero.build"], tmp_path, PYTHONPATH=str(installed), DS_ACCELERATOR="cpu"
    )
    assert Path(op.splitlines()[-1]).is_file()


@pytest.mark.slow
def test_jobs_run_on_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    names = sorted(path.stem for path in (PROJECT / "jobs").glob("*.py") if path.stem != "__init__")
    stages = "[load_object(row.function) for row in STAGES]"
    code = (
        f"import importlib; [importlib.import_module('jobs.' + name) for name in {names}]\n"
        "from ray_ds.stage_table import STAGES, load_object\n"
        f"print(len({stages}))"
    )
    printed = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=f"{installed}:{tmp_path}")
    assert int(printed.splitlines()[-1]) == len(STAGES)
    assert (installed / "bin" / "ray-ds").is_file() and not (installed / "jobs").exists()
