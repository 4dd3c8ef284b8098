"""The bench's own half: what it gives vLLM loads here, and the scores are those of the model."""

from pathlib import Path

import pytest
import torch

from jobs.bench.quantize_in_vllm import VOCAB_SIZE, make_model, score, score_in_vllm
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.quantize import load_quantized, quantize_folder


def test_scores_are_log_probabilities_of_each_next_token(tmp_path: Path) -> None:
    make_model(tmp_path / "source")
    quantize_folder(tmp_path / "source", tmp_path / "out", max_shard_bytes=1 << 30)
    prompts = torch.randint(0, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(1))
    decoder = load_checkpoint_folder(tmp_path / "source", dtype=torch.float32, device="cpu")
    scores = score(decoder, prompts)
    with torch.inference_mode():
        nats = [float(decoder(row[None, :-1], targets=row[None, 1:])) for row in prompts]
    torch.testing.assert_close(scores.sum(dim=1), -torch.tensor(nats), rtol=1e-4, atol=1e-4)
    assert 0 < (scores - score(load_quantized(tmp_path / "out"), prompts)).abs().mean() < 0.5


def test_a_python_without_vllm_is_named(tmp_path: Path) -> None:
    import sys

    with pytest.raises(SystemExit, match=r"vLLM gave no answer:(.|\n)*(vllm|config.json|No such file)"):
        score_in_vllm(sys.executable, tmp_path, torch.zeros(1, 2, dtype=torch.int64))
