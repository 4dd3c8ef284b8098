"""Answers that a model writes, many at once; each depends on its own prompt and draws alone."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_ds.evaluate.continuations import Continuation, Key, cut_left
from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import Decoder
from ray_ds.tokenizer import BpeTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What an answer is written to, and how."""

    key: Key
    """What its answer is kept under."""
    tokens: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    """0 = always the likeliest token."""
    seed: str = ""
    """What the draws follow from; unused where the temperature is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model wrote."""

    text: str
    """Without the stop text."""
    is_stopped: bool
    """Whether a stop text or the end of the document ended it, rather than `max_new_tokens`."""


def fit_prompt(tokens: tuple[int, ...], max_new_tokens: int, seq_len: int, bos_id: int) -> tuple[int, ...] | None:
    """Return a prompt that leaves room for its answer in a model that sees `seq_len` tokens, its beginning cut off.

    BOS stays where it begins with it. None where the answer alone takes all room.
    """
    # The last token written is never read.
    room = Continuation(tokens=tokens + (0,) * max_new_tokens, start=len(tokens))
    fitting = cut_left([room], seq_len, bos_id)
    return None if fitting is None else fitting[0].tokens[: fitting[0].start]


def batch_prompts(prompts: Sequence[Prompt], micro_batch: int) -> Iterator[Sequence[Prompt]]:
    """Yield runs of prompts of about one length, longest first."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.key))
    for start in range(0, len(ordered), micro_batch):
        yield ordered[start : start + micro_batch]


def write_answers(
    decoder: Decoder, tokenizer: BpeTokenizer, prompts: Sequence[Prompt], device: str = "cpu"
) -> dict[Key, Answer]:
    """Return the answer to each prompt, by its key. All are read at once and written a token at a time."""
    answers: dict[Key, Answer] = {}
    writing = [_Writer(prompt, tokenizer, slot) for slot, prompt in enumerate(prompts)]
    max_len = max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
    dtype = decoder.model.embed_tokens.weight.dtype
    cache = SlotCache(decoder.config, len(prompts), max_len, dtype=dtype, device=device)
    with torch.inference_mode():
        new = [prompt.tokens for prompt in prompts]
        while writing:
            logits = _next_logits(decoder, cache, [writer.slot for writer in writing], new, device)
            for writer, token in zip(writing, _choose_tokens(logits, writing), strict=True):
                writer.push(token)
                if writer.is_finished:
                    answers[writer.prompt.key] = Answer(text=writer.text, is_stopped=writer.is_stopped)
            writing = [writer for writer in writing if not writer.is_finished]
            new = [(writer.tokens[-1],) for writer in writing]
    return answers


def _next_logits(
    decoder: Decoder, cache: SlotCache, slots: Sequence[int], new: Sequence[Sequence[int]], device: str
) -> Tensor:
    """Add tokens to the sequences in some slots; return the logits (B, V) that follow the last of each."""
    lengths = [len(own) for own in new]
    tokens = torch.zeros((len(new), max(lengths)), dtype=torch.int64)  # (B, T)
    for row, own in enumerate(new):
        tokens[row, : len(own)] = torch.tensor(own)
    last = torch.tensor(lengths, device=device) - 1
    return decoder(tokens.to(device), cache=cache.rows(slots, lengths), logit_positions=last)  # type: ignore[no-any-return]


def _choose_tokens(logits: Tensor, writing: Sequence["_Writer"]) -> list[int]:
    """Return the next token of each row of logits (B, V).

    A drawn token is found in the cumulative distribution in order of token id, so that rounding in the logits moves
    the borders a little and never reorders them.
    """
    tokens = logits.argmax(dim=-1)  # (B,)
    for row, writer in enumerate(writing):
        temperature = writer.prompt.temperature
        if temperature > 0:
            own = logits[row].double()
            cumulative = ((own - own.max()) / temperature).softmax(dim=-1).cumsum(dim=-1)  # (V,)
            target = writer.draw() * cumulative[-1:]
            tokens[row] = torch.searchsorted(cumulative, target, right=True)[0].clamp(max=len(own) - 1)
    result: list[int] = tokens.tolist()
    return result


class _Writer:
    """One answer while it is written."""

    def __init__(self, prompt: Prompt, tokenizer: BpeTokenizer, slot: int) -> None:
        self.prompt = prompt
        self.slot = slot
        self.tokens: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(int.from_bytes(hashlib.sha256(prompt.seed.encode()).digest()))

    @property
    def is_finished(self) -> bool:
        """Tell whether nothing is to be added."""
        return self.is_stopped or len(self.tokens) == self.prompt.max_new_tokens

    def draw(self) -> float:
        """Return the answer's next random number in [0, 1)."""
        return float(self._random.random())

    def push(self, token: int) -> None:
        """Add a token; one that ends an answer or begins another text is none of it, as in serving."""
        if token in self._tokenizer.stop_ids:
            self.is_stopped = True
            return
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens)
        ends = [at for at in (text.find(stop) for stop in self.prompt.stop) if at >= 0]
        self.is_stopped = bool(ends)
        self.text = text[: min(ends)] if ends else text
