"""llama.cpp with the same dense model in Q8_0; needs a Python that has llama-cpp-python, gguf and numpy.

By its C interface: the high-level class answers one prompt at a time. All prompts are read in batches of `BATCH`
tokens, then every step gives each sequence its next token.
"""

from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from jobs.bench.serving.gguf_file import write_gguf
from jobs.bench.serving.work import Generate, Prompts, Work, run_as_program

BATCH = 2048
"""Tokens that are handed over at a time, llama.cpp's own default."""
Item = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether what follows it is wanted."""


class Sequences:
    """A model with a cache for several sequences."""

    def __init__(self, file: Path, work: Work) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = max(work.concurrency)
        params.n_ctx = params.n_seq_max * work.max_len
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = work.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vocab_size = work.vocab_size

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def add(self, items: Sequence[Item]) -> dict[int, int]:
        """Add tokens to their sequences; return the likeliest next token of each sequence where it is wanted."""
        found = {}
        for first in range(0, len(items), BATCH):
            part = items[first : first + BATCH]
            for place, (token, position, sequence, is_wanted) in enumerate(part):
                self._batch.token[place] = token
                self._batch.pos[place] = position
                self._batch.n_seq_id[place] = 1
                self._batch.seq_id[place][0] = sequence
                self._batch.logits[place] = is_wanted
            self._batch.n_tokens = len(part)
            if (code := llama_cpp.llama_decode(self._context, self._batch)) != 0:
                raise RuntimeError(f"llama_decode gave {code}")
            for place, (_, _, sequence, is_wanted) in enumerate(part):
                if is_wanted:
                    logits = llama_cpp.llama_get_logits_ith(self._context, place)
                    found[sequence] = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
        return found


def load(work: Work) -> Generate:
    """Return what answers with the model of a bf16 folder, beside which a GGUF file is left."""
    file = Path(work.folder) / "model.gguf"
    write_gguf(Path(work.folder), file)
    sequences = Sequences(file, work)

    def generate(prompts: Prompts, num_tokens: int) -> list[int]:
        sequences.clear()
        items = [
            (token, position, sequence, position == work.prompt_tokens - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        answers = {sequence: [token] for sequence, token in sequences.add(items).items()}
        for position in range(work.prompt_tokens, work.prompt_tokens + num_tokens - 1):
            last = [(answer[-1], position, sequence, True) for sequence, answer in answers.items()]
            for sequence, token in sequences.add(last).items():
                answers[sequence].append(token)
        return [len(answer) for answer in answers.values()]

    return generate


if __name__ == "__main__":
    run_as_program(load)
