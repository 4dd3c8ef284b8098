import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ds.errors import ArtifactError
from ray_ds.storage import sha256_file
from ray_ds.train.checkpoints.tensor_file import DTYPES, TensorFile, write_tensors

TENSORS = {str(dtype): (torch.arange(7) % 2).to(dtype) for dtype in DTYPES.values()}


def test_what_is_written_is_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    info = write_tensors(str(tmp_path), "folder/a.safetensors", TENSORS)
    file = tmp_path / info.path
    loaded = load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert (info.bytes, info.sha256) == (file.stat().st_size, sha256_file(str(file)))


def test_what_the_safetensors_package_writes_is_read_by_ranges(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    for name, tensor in TENSORS.items():
        target = torch.empty(3, dtype=tensor.dtype)
        file.read_into(name, 2, target)
        assert torch.equal(target, tensor[2:5])
    file.close()


def read_all(path: Path) -> None:
    file = TensorFile(path)
    try:
        for name, tensor in TENSORS.items():
            file.read_into(name, 0, torch.empty_like(tensor))
    finally:
        file.close()


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    info = write_tensors(str(tmp_path), "a.safetensors", TENSORS)
    path = tmp_path / info.path
    data = path.read_bytes()
    read_all(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"a\.safetensors \(.*must be a whole safetensors file, as it was"):
            read_all(path)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"[1, 2]", "its header is no JSON object"),
        (b'{"w": ', "its header is no JSON"),
        (b'{"w": {"dtype": "F4", "data_offsets": [0, 4]}}', "it has no tensor w"),
        (b'{"w": {"dtype": "F32", "data_offsets": [0]}}', "it has no tensor w"),
        (b'{"v": {"dtype": "F32", "data_offsets": [0, 4]}}', "it has no tensor w"),
        (b'{"w": {"dtype": "I32", "data_offsets": [0, 4]}}', "w is of type torch.int32 instead of torch.float32"),
        (b'{"w": {"dtype": "F32", "data_offsets": [0, 4]}}', "w has 1 elements, not 2"),
    ],
)
def test_another_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ArtifactError) as error:
        TensorFile(path).read_into("w", 0, torch.empty(2))
    assert message in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent \(it is missing\) must be a whole safetensors file"):
        TensorFile(tmp_path / "absent")
