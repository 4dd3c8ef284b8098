"""The files of a model on this node, wherever its artefact lies."""

import os
import shutil
from pathlib import Path

from ray_ds import storage

MODEL_FOLDER = "model"


def local_model_folder(artifact_uri: str, cache: Path) -> Path:
    """Return an artefact's `model/` on this node, copied into `cache` when the artefact is on an object store."""
    uri = storage.join(artifact_uri, MODEL_FOLDER)
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    name = artifact_uri.rstrip("/").rsplit("/", 1)[-1]  # the artefact's digest
    target, partial = cache / name, cache / f".{name}.{os.getpid()}.partial"
    if target.exists():
        return target
    for entry in storage.list_files(uri):
        path = partial / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for block in storage.read_blocks(storage.join(uri, entry.path)):
                file.write(block)
    try:
        os.replace(partial, target)
    except OSError:  # another process of this node was faster
        shutil.rmtree(partial)
        assert target.exists(), f"cannot move {partial} to {target}"
    return target
