"""Imported models of every family become INT8 models."""

from pathlib import Path

import pytest
import torch

from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import load_quantized
from ray_ds.quantize.convert import dequantize_state, quantize_folder
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import CASES, make_folder, read_tensors


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_can_be_quantized(case: str, tmp_path: Path) -> None:
    """The INT8 model computes as the float model that its integers stand for, but for rounded activations."""
    artifact = import_alone(str(make_folder(tmp_path / "in", case)), str(tmp_path / "runs"))
    source, target = Path(artifact.path("model")), tmp_path / "int8"
    quantize_folder(source, target, max_shard_bytes=1 << 30)
    quantized = load_quantized(target)
    assert (target / "special_ids.json").read_bytes() == (source / "special_ids.json").read_bytes()
    floats = load_checkpoint_folder(source, dtype=torch.float32, device="cpu")
    standing_for = dequantize_state(read_tensors(target))
    state = {name: tensor for name, tensor in standing_for.items() if name in floats.state_dict()}
    floats.load_state_dict(state, strict=False)
    tokens = torch.randint(quantized.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = quantized(tokens), floats(tokens)
    agree = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert agree > 0.95
