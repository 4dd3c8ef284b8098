"""transformers' `generate` with the same model in bf16."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from jobs.bench.serving.work import Generate, Prompts, Work, run_as_program


def load_model(work: Work) -> Any:
    """Return the model on its device; no token ends an answer."""
    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.bfloat16).to(work.device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load(work: Work) -> Generate:
    """Return what answers all prompts as one batch."""
    model = load_model(work)

    @torch.inference_mode()
    def generate(prompts: Prompts, num_tokens: int) -> list[int]:
        tokens = torch.tensor(prompts, device=work.device)
        mask = torch.ones_like(tokens)
        answers = model.generate(tokens, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
        return [len(answer) - work.prompt_tokens for answer in answers.tolist()]

    return generate


if __name__ == "__main__":
    run_as_program(load)
