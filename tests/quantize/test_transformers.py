"""transformers with the package compressed-tensors opens a dense quantized folder as it is."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_ds.config.quantize import Scheme
from ray_ds.model.checkpoint_folder import read_tensors
from ray_ds.quantize import dequantize_state, load_quantized, quantize_folder
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import make_folder
from tests.quantize.tiny_models import make_tokens, write_checkpoint

ALLOWED: dict[Scheme, float] = {"w8a8": 0.02, "w8a16": 1e-3, "fp8": 1e-3}
"""Relative distance of logits. With INT8 activations both round them, but compressed-tensors to steps of max / 127.5
where this package, and vLLM's kernels, have max / 127: as far from each other as from the floats."""


def assert_transformers_agrees(folder: Path, scheme: Scheme, tokens: torch.Tensor) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected, found = other(tokens).logits, load_quantized(folder)(tokens)
    assert (found - expected).norm() / expected.norm() < ALLOWED[scheme]
    held = other.state_dict()
    for name, weight in dequantize_state(read_tensors(folder)).items():
        assert torch.equal(held[name], weight), name


@pytest.mark.shows("transformers with compressed-tensors loads a dense W8A8, W8A16 or FP8 folder and gives our logits")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "fp8"])
def test_a_dense_model_of_latent_attention(scheme: Scheme, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "dense")
    quantize_folder(source, tmp_path / "out", max_shard_bytes=1 << 30, scheme=scheme)
    assert_transformers_agrees(tmp_path / "out", scheme, make_tokens(4, 32, seed=900))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "fp8"])
def test_a_llama(scheme: Scheme, tmp_path: Path) -> None:
    artifact = import_alone(str(make_folder(tmp_path / "in", "llama")), str(tmp_path / "runs"))
    quantize_folder(Path(artifact.path("model")), tmp_path / "out", max_shard_bytes=1 << 30, scheme=scheme)
    assert_transformers_agrees(tmp_path / "out", scheme, make_tokens(4, 32, seed=901))
