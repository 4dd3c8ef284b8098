"""Models come from an object store and go to one."""

from pathlib import Path

import torch

from ray_ds import storage
from ray_ds.artifacts import Checkpoint
from ray_ds.exchange.export_folder import export_checkpoint
from ray_ds.model.tensor_folder import list_tensors
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import make_folder, read_tensors


def test_a_model_is_imported_and_exported_on_an_object_store(folder: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "llama", dtype=torch.bfloat16)
    for path in source.iterdir():
        storage.write_bytes(f"{folder}/models/llama/{path.name}", path.read_bytes())
    artifact = import_alone(f"{folder}/models/llama", f"{folder}/runs", max_shard_bytes=60_000)
    assert isinstance(artifact, Checkpoint)
    artifact.verify_files()
    export_checkpoint(artifact, f"{folder}/out", dtype=None, max_shard_bytes=60_000)
    found = list_tensors(f"{folder}/out")
    for name, tensor in read_tensors(source).items():
        assert torch.equal(found[name].read(), tensor)
    assert storage.exists(f"{folder}/out/config.json")
