"""Runs of a stage without a recipe."""

from collections.abc import Callable
from pathlib import Path

from ray_ds.artifacts import Artifact
from ray_ds.stage_run import StageRun

DIGEST = "0123456789abcdef"


def make_run(
    folder: Path, kind: str, inputs: tuple[Artifact, ...] = (), check_alone: Callable[[], None] = lambda: None
) -> StageRun:
    return StageRun(
        step="step",
        stage="stage",
        stage_version=1,
        kind=kind,
        run_dir=str(folder),
        uri=str(folder / DIGEST),
        digest=DIGEST,
        settings={},
        inputs=inputs,
        check_alone=check_alone,
    )
