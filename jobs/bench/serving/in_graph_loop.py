"""A bare loop on a GPU: transformers' model in INT8 by torchao, its decode step compiled into a CUDA graph."""

from collections.abc import Callable
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
    answer = loop_with(model, work)
    return lambda prompts, num_tokens: [len(tokens) for tokens in answer(prompts, num_tokens)]


def loop_with(model: Any, work: Work) -> Callable[[Prompts, int], list[list[int]]]:
    """Return a loop around one compiled step for each batch size, with a cache of fixed places; it gives tokens."""
    caches: dict[int, StaticCache] = {}

    def step(tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        logits = model(tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)

    decode = torch.compile(step, mode="reduce-overhead")

    @torch.inference_mode()
    def answer(prompts: Prompts, num_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=work.device)  # (B, T)
        cache = caches.setdefault(len(prompts), StaticCache(config=model.config, max_cache_len=work.max_len))
        cache.reset()
        last = step(tokens, torch.arange(work.prompt_tokens, device=work.device)[None], cache)
        found = [last]
        for place in range(work.prompt_tokens, work.prompt_tokens + num_tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            last = decode(last, torch.tensor([[place]], device=work.device), cache).clone()
            found.append(last)
        rows: list[list[int]] = torch.cat(found, dim=1).tolist()
        return rows

    return answer


if __name__ == "__main__":
    run_as_program(load)
