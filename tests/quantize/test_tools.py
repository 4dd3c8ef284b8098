"""`ray-ds quantized inspect`, `verify` and `dequantize`."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ray_ds.artifacts import QuantizedModel
from ray_ds.cli import main
from ray_ds.config.quantize import Scheme
from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.quantize.tools import inspect_lines, verify_lines
from tests.quantize.tiny_models import Kind, make_tokens, write_checkpoint
from tests.stages.small_artifacts import flip_byte, stage_run

MEASURED: Mapping[str, float] = {
    "perplexity": 2.5,
    "perplexity_ratio": 1.0012,
    "kl": 0.002,
    "top1_agreement": 0.991,
    "tokens": 2048,
    "size_ratio": 0.7,
    "smoothing": 0.5,
}


def make_artifact(folder: Path, kind: Kind, scheme: Scheme = "w8a8") -> QuantizedModel:
    run = stage_run(folder, "QuantizedModel")
    source = write_checkpoint(folder / "source", kind)
    written = quantize_folder(source, Path(run.path("model")), max_shard_bytes=1 << 30, scheme=scheme)
    artifact = run.commit({**MEASURED, "weight_errors": dict(written.weight_errors)}, seconds=0.0)
    assert isinstance(artifact, QuantizedModel)
    return artifact


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["quantized", *arguments])
    assert isinstance(ended.value.code, int)
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


def test_inspect_shows_scheme_sizes_gates_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path, "moe")
    status, out = run_command(capsys, "inspect", artifact.uri)
    assert status == 0
    tensors = load_file(artifact.path("model", "model.safetensors"))
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name and tensor.dtype == torch.int8]
    assert "scheme w8a8 (int-quantized)" in out and "smoothing: 0.5" in out
    assert f"routed experts, int8: {len(experts)}, {sum(tensor.nbytes for tensor in experts):,} (" in out
    assert f"all: {len(tensors)}, {sum(tensor.nbytes for tensor in tensors.values()):,}" in out
    assert "perplexity_ratio: 1.0012" in out and "top1_agreement: 0.991" in out
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            assert f"  {name}: 0.0" in out


def test_a_model_of_an_earlier_version_is_shown_too(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "QuantizedModel")
    quantize_folder(write_checkpoint(tmp_path / "source", "dense"), Path(run.path("model")), max_shard_bytes=1 << 30)
    artifact = run.commit({"perplexity_ratio": 1.003}, seconds=0.0)
    assert isinstance(artifact, QuantizedModel)
    lines = inspect_lines(artifact)
    assert lines[0] == "scheme w8a8 (int-quantized)" and lines[-1] == "  perplexity_ratio: 1.003"


def test_no_tensor_is_of_an_unknown_kind(tmp_path: Path) -> None:
    for kind in ("dense", "moe"):
        assert not any("others" in line for line in inspect_lines(make_artifact(tmp_path / kind, kind)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "fp8"])
def test_verify_passes_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: Scheme) -> None:
    status, out = run_command(capsys, "verify", make_artifact(tmp_path, "dense", scheme).uri)
    assert status == 0
    assert "files: 4 have the sha256" in out and "quantized, every tensor" in out and "is right for all shapes" in out


def test_verify_names_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path, "dense")
    path = flip_byte(artifact)
    status, out = run_command(capsys, "verify", artifact.uri)
    assert status == 2
    assert f"{path.name} (sha256" in out


def test_verify_names_a_tensor_that_does_not_fit(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "QuantizedModel")
    quantize_folder(write_checkpoint(tmp_path / "source", "dense"), Path(run.path("model")), max_shard_bytes=1 << 30)
    tensors = load_file(run.path("model", "model.safetensors"))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, run.path("model", "model.safetensors"), metadata={"format": "pt"})
    artifact = run.commit(MEASURED, seconds=0.0)
    assert isinstance(artifact, QuantizedModel)
    with pytest.raises(ArtifactError, match=r"down_proj.weight \(shape \(48, 95\), type torch.int8\) must have shape"):
        verify_lines(artifact)


@pytest.mark.shows("`ray-ds quantized dequantize` writes what the integers stand for, experts too, for transformers")
def test_dequantize_gives_a_folder_for_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path, "moe", "w8a16")
    target = tmp_path / "floats"
    status, _ = run_command(capsys, "dequantize", artifact.uri, "--output", str(target), "--dtype", "float32")
    assert status == 0
    tokens = make_tokens(4, 32, seed=31)
    with torch.inference_mode():
        expected = load_quantized(artifact.path("model"))(tokens)
        ours = load_checkpoint_folder(target, dtype=torch.float32, device="cpu")(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(target).eval()(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (target / "tokenizer.json").exists()


def test_dequantize_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path, "dense")
    status, out = run_command(capsys, "dequantize", artifact.uri, "--output", str(tmp_path / "source"))
    assert status == 2
    assert "must be empty or absent; choose another folder" in out
