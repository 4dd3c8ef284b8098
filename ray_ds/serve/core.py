"""One step after another: read prompts, write tokens, send what they make certain. No threads; see `engine.py`."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ray_ds.serve.answer import Answer
from ray_ds.serve.block_pool import BlockPool
from ray_ds.serve.logit_rules import apply_rules
from ray_ds.serve.requests import Embedding, Event, Failure, FinishReason, PromptScores, TokenLogprobs
from ray_ds.serve.sampler import draw_tokens, token_logprobs
from ray_ds.serve.scheduler import Scheduler
from ray_ds.serve.text_stream import TextStream
from ray_ds.serve.work_rate import WorkRate

SCORED_ROWS = 64
"""Prompt tokens whose logits are made at once where their log-probabilities are wanted."""
NOT_FINITE = "the model gave numbers that are not finite"


class BlockModel(Protocol):
    """A decoder with a cache of `num_blocks` blocks of `block_size` tokens; a sequence has `max_len` at most."""

    num_blocks: int
    block_size: int
    max_len: int

    def read(self, blocks: Sequence[int], start: int, tokens: Sequence[int]) -> Tensor:
        """Add tokens to the sequence in `blocks`, which holds `start`; return their hidden states, (T, D)."""

    def write(self, blocks: Sequence[Sequence[int]], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each sequence; return their hidden states, (B, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) that follow hidden states (N, D)."""

    def wipe(self, blocks: Sequence[int]) -> None:
        """Make blocks zero that held what is no number."""


class TokenTable(Protocol):
    """What the engine asks of a tokenizer."""

    vocab_size: int
    stop_ids: frozenset[int]
    """End an answer."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one id stands for."""


class EngineCore:
    """Owns the model, the cache's blocks and the answers on their way."""

    def __init__(
        self,
        model: BlockModel,
        tokenizer: TokenTable,
        end: Callable[[Answer, Event], None],
        *,
        max_running: int,
        step_tokens: int,
        cuts_anywhere: bool,
        reuses_prefixes: bool,
    ) -> None:
        """Start with nothing to do.

        Args:
            end: takes an answer that is finished, its blocks free, and its last event, which it sends.
            max_running, step_tokens, cuts_anywhere: as in `Scheduler`.
            reuses_prefixes: whether the cache is searched for the beginnings of prompts.
        """
        self.pool = BlockPool(model.num_blocks, model.block_size, keeps=reuses_prefixes)
        self.scheduler = Scheduler(
            self.pool, max_running=max_running, step_tokens=step_tokens, cuts_anywhere=cuts_anywhere
        )
        self.reading = WorkRate()
        self.writing = WorkRate()
        self.num_steps = 0
        self.num_tokens = 0
        self._model = model
        self._tokenizer = tokenizer
        self._end = end

    @torch.inference_mode()
    def step(self) -> None:
        """Give every answer that writes its next token, then read a part of the prompts."""
        step = self.scheduler.plan()
        if step.writing:
            self._write(step.writing)
        for answer, num_tokens in step.reading:
            self._read(answer, num_tokens)
        self.num_steps += 1

    def _write(self, answers: Sequence[Answer]) -> None:
        started = time.perf_counter()
        hidden = self._model.write(
            [answer.blocks for answer in answers],
            [answer.num_computed for answer in answers],
            [answer.tokens[-1] for answer in answers],
        )  # (B, D)
        for answer in answers:
            self.scheduler.computed(answer, 1)
        self._sample(answers, self._logits(hidden))
        self.writing.add(len(answers), time.perf_counter() - started)

    def _read(self, answer: Answer, num_tokens: int) -> None:
        started = time.perf_counter()
        start = answer.num_computed
        hidden = self._model.read(answer.blocks, start, answer.tokens[start : start + num_tokens])  # (T, D)
        self.scheduler.computed(answer, num_tokens)
        if answer.params is None:
            answer.states.append(hidden)
        elif answer.wants_prompt:
            self._score(answer, start, hidden)
        if answer.num_missing == 0:
            self._finish_reading(answer, hidden)
        self.reading.add(num_tokens, time.perf_counter() - started)

    def _finish_reading(self, answer: Answer, hidden: Tensor) -> None:
        """Send what reading a prompt gives, and sample the first token where one is wanted."""
        if answer.params is None:
            self._embed(answer)
            return
        if answer.wants_prompt:
            answer.emit(self._prompt_scores(answer))
        if answer.params.max_tokens == 0:
            self._finish(answer, answer.take_piece("", "length"))
        else:
            self._sample([answer], self._logits(hidden[-1:]))

    def _embed(self, answer: Answer) -> None:
        mean = torch.cat(answer.states).double().mean(dim=0)  # (D,)
        if not mean.isfinite().all():
            self._fail(answer)
            return
        values = mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
        self._finish(answer, Embedding(values=tuple(values.tolist())))

    def _score(self, answer: Answer, start: int, hidden: Tensor) -> None:
        """Keep how likely the prompt's tokens behind those read were, from their hidden states (T, D)."""
        assert answer.params is not None and answer.params.prompt_logprobs is not None
        following = answer.tokens[start + 1 : start + 1 + len(hidden)]
        for first in range(0, len(following), SCORED_ROWS):
            tokens = following[first : first + SCORED_ROWS]
            for row, token in zip(self._logits(hidden[first : first + len(tokens)]), tokens, strict=True):
                answer.scores.append(token_logprobs(row, token, answer.params.prompt_logprobs))

    def _prompt_scores(self, answer: Answer) -> PromptScores:
        """Return a prompt's scores with the places of its tokens in its text."""
        text = TextStream()
        entries = []
        for token, before, (logprob, top) in zip(answer.tokens[1:], answer.tokens, answer.scores, strict=False):
            text.push(self._tokenizer.token_bytes(before))
            entries.append(TokenLogprobs(token=token, logprob=logprob, top=top, text_offset=text.num_chars))
        return PromptScores(logprobs=tuple(entries))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return logits (N, V) of hidden states (N, D).

        A model may have more rows than its tokenizer has tokens; those were never trained.
        """
        return self._model.logits(hidden)[:, : self._tokenizer.vocab_size]

    def _sample(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Sample one token for each row of `logits` (B, V) and send what it makes certain."""
        is_finite = logits.isfinite().all(dim=-1).tolist()
        params = [answer.params for answer in answers if answer.params is not None]
        ruled = torch.stack([self._apply_rules(answer, row) for answer, row in zip(answers, logits, strict=True)])
        tokens = draw_tokens(ruled, params, [answer.random.random() for answer in answers])
        for row, answer in enumerate(answers):
            if is_finite[row]:
                self._take(answer, tokens[row], logits[row])
            else:
                self._fail(answer)

    def _apply_rules(self, answer: Answer, logits: Tensor) -> Tensor:
        """Return an answer's row of logits (V,) after all that its request wants done to them."""
        assert answer.params is not None
        banned = self._ends(answer) if answer.num_sampled < answer.params.min_tokens else ()
        return apply_rules(logits, answer.params, prompt=answer.request.prompt, counts=answer.counts, banned=banned)

    def _ends(self, answer: Answer) -> frozenset[int]:
        """Return the tokens that end an answer."""
        assert answer.params is not None
        own = answer.params.stop_token_ids
        return own if answer.params.ignore_eos else own | self._tokenizer.stop_ids

    def _take(self, answer: Answer, token: int, logits: Tensor) -> None:
        """Append a token to an answer; end it where a rule says so."""
        params = answer.params
        assert params is not None
        answer.tokens.append(token)
        answer.counts[token] += 1
        answer.num_unsent += 1
        self.num_tokens += 1
        reason: FinishReason | None = None
        text = ""
        if params.logprobs is not None:
            logprob, top = token_logprobs(logits, token, params.logprobs)
            offset = answer.text.num_chars
            answer.unsent.append(TokenLogprobs(token=token, logprob=logprob, top=top, text_offset=offset))
        if token in self._ends(answer):
            reason = "stop"
        else:
            may_stop = answer.num_sampled >= params.min_tokens
            text = answer.text.push(self._tokenizer.token_bytes(token), may_stop=may_stop)
            if answer.text.is_stopped:
                reason = "stop"
            elif answer.num_sampled == params.max_tokens:
                reason = "length"
        if reason is not None:
            text += answer.text.finish()
            self._finish(answer, answer.take_piece(text, reason))
        elif text:
            answer.emit(answer.take_piece(text, None))

    def _fail(self, answer: Answer) -> None:
        """End an answer whose numbers are spoilt, and leave nothing of them in the cache."""
        self._model.wipe(self.pool.forget(answer.blocks))
        self._finish(answer, Failure(message=NOT_FINITE))

    def _finish(self, answer: Answer, last: Event) -> None:
        self.scheduler.release(answer)
        self._end(answer, last)
