"""Safetensors written by us are read by the package and the other way round."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ds.errors import ArtifactError
from ray_ds.model.tensor_folder import list_tensors
from ray_ds.model.tensor_writer import write_shards

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.randn(2, 2, 2).to(torch.float16),
    "d": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "e": torch.zeros(0, 3),
}


def write(folder: Path, max_shard_bytes: int) -> list[str]:
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    return list(write_shards(folder, sizes, TENSORS.__getitem__, max_shard_bytes=max_shard_bytes))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and found.dtype == wanted.dtype and torch.equal(found.float(), wanted.float())


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 40])
def test_what_is_written_is_read(max_shard_bytes: int, tmp_path: Path) -> None:
    names = write(tmp_path, max_shard_bytes)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    by_package = {}
    for path in tmp_path.glob("*.safetensors"):
        by_package |= load_file(path)
    stored = list_tensors(str(tmp_path))
    assert stored.keys() == by_package.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same(stored[name].read(), tensor) and same(by_package[name], tensor)


def test_whoever_reads_the_folder_reads_the_weights(tmp_path: Path) -> None:
    for mode in (0o755, 0o700):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        write(folder, 1 << 20)
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 40)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file({**load_file(path), "a": TENSORS["a"]}, path)
    with pytest.raises(ArtifactError, match=r"a \(in .+\) must be in one file"):
        list_tensors(str(tmp_path))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 1 << 20)
    stored = list_tensors(str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"d \(\d+ bytes\) must have 16|bytes\) must have"):
        for tensor in stored.values():
            tensor.read()
