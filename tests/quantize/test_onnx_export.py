"""`ray-ds export --to onnx`: a graph for ONNX Runtime that predicts as the model does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, load

from ray_ds.artifacts import Artifact, Checkpoint
from ray_ds.cli import main
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import onnx_export
from ray_ds.quantize.onnx_export import MODEL_FILE, export_onnx, write_float_graph
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import CASES, make_folder
from tests.quantize.tiny_models import Kind, make_tokens, write_checkpoint
from tests.stages.small_artifacts import stage_run

DENSE = [case for case in CASES if CASES[case][0] in ("Llama", "Qwen2", "Qwen3")]


def make_checkpoint(folder: Path, kind: Kind) -> Artifact:
    run = stage_run(folder, "Checkpoint")
    write_checkpoint(Path(run.path("model")), kind)
    return run.commit({"tokenizer_digest": "t0"}, seconds=0.0)


def run_graph(path: Path, tokens: torch.Tensor) -> Any:
    return onnxruntime.InferenceSession(path).run(["logits"], {"input_ids": tokens.numpy()})[0]


@pytest.mark.parametrize("case", DENSE)
def test_the_float_graph_gives_our_logits_for_any_batch_and_length(case: str, tmp_path: Path) -> None:
    artifact = import_alone(str(make_folder(tmp_path / "in", case)), str(tmp_path / "runs"))
    decoder = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    write_float_graph(decoder, tmp_path / MODEL_FILE)
    for shape in ((1, 1), (2, 8), (3, 29)):
        tokens = make_tokens(*shape, seed=40)
        with torch.inference_mode():
            expected = decoder(tokens)
        np.testing.assert_allclose(run_graph(tmp_path / MODEL_FILE, tokens), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.shows("A dense model as ONNX with dynamic INT8 predicts in ONNX Runtime as the checkpoint does")
def test_the_integer_graph_predicts_as_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_checkpoint(tmp_path, "dense")
    with pytest.raises(SystemExit) as ended:
        main(["export", artifact.uri, "--to", "onnx", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MODEL_FILE, "tokenizer.json"}
    decoder = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    tokens = make_tokens(8, 32, seed=41)
    with torch.inference_mode():
        expected = decoder(tokens).log_softmax(dim=-1)
    found = torch.from_numpy(run_graph(tmp_path / "out" / MODEL_FILE, tokens)).log_softmax(dim=-1)
    assert float((expected.exp() * (expected - found)).sum(dim=-1).mean()) < 0.01
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.98
    weights = {tensor.name: tensor for tensor in load(tmp_path / "out" / MODEL_FILE).graph.initializer}
    integers = [tensor for tensor in weights.values() if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2]
    assert len(integers) == 2 * 7 + 1  # all products of both layers, and the head
    for tensor in integers:  # seven bits: pairs of products with unsigned bytes never leave 16
        assert np.abs(np.frombuffer(tensor.raw_data, np.int8).astype(int)).max() <= 64


def test_what_has_no_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, dense = make_checkpoint(tmp_path / "moe", "moe"), make_checkpoint(tmp_path / "dense", "dense")
    assert isinstance(dense, Checkpoint)
    with pytest.raises(ArtifactError, match=r"n_routed_experts \(4\) must be 0 for ONNX; export a dense model"):
        export_onnx(experts, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"--output .* must be a local folder, empty or absent"):
        export_onnx(dense, str(tmp_path / "dense"))
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    with pytest.raises(ArtifactError, match=r"must have at most 1000 bytes of weights in fp32 for ONNX; export a sm"):
        export_onnx(dense, str(tmp_path / "out"))
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ConfigError, match=r"--to \(onnx\) needs onnxruntime; pip install onnxruntime"):
        export_onnx(dense, str(tmp_path / "out"))


def test_options_of_the_other_layout_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_checkpoint(tmp_path, "dense")
    with pytest.raises(SystemExit) as ended:
        main(["export", artifact.uri, "--to", "onnx", "--output", str(tmp_path / "out"), "--dtype", "float16"])
    assert ended.value.code == 2
    assert "--dtype (float16) has no effect with --to onnx; leave it out" in capsys.readouterr().err
