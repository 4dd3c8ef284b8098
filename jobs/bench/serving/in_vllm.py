"""vLLM with the same model in bf16; needs a Python that has vLLM, and nothing of this package's."""

from vllm import LLM, SamplingParams

from jobs.bench.serving.work import Generate, Prompts, Work, run_as_program


def load(work: Work) -> Generate:
    """Return what answers by continuous batching."""
    engine = LLM(
        model=work.folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=work.max_len,
        max_num_seqs=max(work.concurrency),
    )

    def generate(prompts: Prompts, num_tokens: int) -> list[int]:
        wanted = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return generate


if __name__ == "__main__":
    run_as_program(load)
