"""Weights in 8-bit floats become the bf16 that they stand for."""

import json
from pathlib import Path

import pytest
import torch

from ray_ds.exchange.fp8 import dequantize
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import change_config, change_tensors, make_folder, read_tensors


def plainly(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = weight[row, column].float() * scale[row // 128, column // 128].float()
    return out.to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (1, 129), (48, 20)])
def test_a_block_has_its_scale(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 30).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) + 0.1
    assert torch.equal(dequantize(weight, scale), plainly(weight, scale))
    powers = torch.exp2(torch.randint(-4, 4, scale.shape, generator=generator).float()).to(torch.float8_e8m0fnu)
    assert torch.equal(dequantize(weight, powers), plainly(weight, powers))


@pytest.mark.shows("DeepSeek-V3's 8-bit weights are read as the bf16 they stand for")
def test_an_8_bit_folder_is_imported_as_bf16(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", "deepseek_v3", dtype=torch.bfloat16)
    wanted: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if name.startswith("model.layers.") and tensor.dim() == 2 and not name.endswith("mlp.gate.weight"):
                scale = torch.full((1, 1), float(tensor.float().abs().max()) / 448)
                tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                tensors[name + "_scale_inv"] = scale
                wanted[name] = plainly(tensors[name], scale)
            else:
                wanted[name] = tensor

    change_tensors(folder, quantize)
    change_config(
        folder,
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    )
    artifact = import_alone(str(folder), str(tmp_path / "runs"))
    found = read_tensors(Path(artifact.path("model")))
    assert found.keys() == wanted.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    config = json.loads(Path(artifact.path("model", "config.json")).read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert artifact.fact("was_fp8") is True
