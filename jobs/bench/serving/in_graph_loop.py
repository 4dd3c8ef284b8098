"""A bare loop on a GPU: transformers' model in INT8 by torchao, its decode step compiled into a CUDA graph."""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from jobs.bench.serving.in_transformers import load_model
from jobs.bench.serving.work import Generate, Prompts, Work, run_as_program


def load(work: Work) -> Generate:
    """Return what answers with weights and activations in INT8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = load_model(work)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return generate_with(model, work)


def generate_with(model: Any, work: Work) -> Generate:
    """Return a loop around one compiled step for each batch size, with a cache of fixed places."""
    caches: dict[int, StaticCache] = {}

    def step(tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        logits = model(tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)

    decode = torch.compile(step, mode="reduce-overhead")

    @torch.inference_mode()
    def generate(prompts: Prompts, num_tokens: int) -> list[int]:
        tokens = torch.tensor(prompts, device=work.device)  # (B, T)
        cache = caches.setdefault(len(prompts), StaticCache(config=model.config, max_cache_len=work.max_len))
        cache.reset()
        last = step(tokens, torch.arange(work.prompt_tokens, device=work.device)[None], cache)
        answer = [last]
        for place in range(work.prompt_tokens, work.prompt_tokens + num_tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            last = decode(last, torch.tensor([[place]], device=work.device), cache).clone()
            answer.append(last)
        return [len(row) for row in torch.cat(answer, dim=1).tolist()]

    return generate


if __name__ == "__main__":
    run_as_program(load)
