"""The files of a model on this node, wherever its artefact lies."""

import os
import shutil
from pathlib import Path

from ray_ds import storage
from ray_ds.artifacts import Artifact

MODEL_FOLDER = "model"


def local_model_folder(artifact: Artifact, cache: Path) -> Path:
    """Return the artefact's `model/` on this node, copied into `cache` when the artefact is on an object store."""
    if not storage.is_remote(artifact.uri):
        return storage.local_path(artifact.path(MODEL_FOLDER))
    target = cache / artifact.digest
    if target.exists():
        return target
    partial = cache / f".{artifact.digest}.{os.getpid()}.partial"
    for info in artifact.manifest.files:
        if info.path.startswith(f"{MODEL_FOLDER}/"):
            path = partial / info.path.removeprefix(f"{MODEL_FOLDER}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for block in storage.read_blocks(artifact.path(info.path)):
                    file.write(block)
    try:
        os.replace(partial, target)
    except OSError:  # another process of this node was faster
        shutil.rmtree(partial)
        assert target.exists(), f"cannot move {partial} to {target}"
    return target
