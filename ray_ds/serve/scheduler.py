"""What the next step computes: first come, first served, into as many blocks as the cache has."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ray_ds.serve.answer import Answer
from ray_ds.serve.block_pool import BlockPool, chain_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The work of one step."""

    writing: Sequence[Answer]
    """Each gets its next token."""
    reading: Sequence[tuple[Answer, int]]
    """Of each, how many of its tokens are read into the cache."""


class Scheduler:
    """The queue, and the answers that run.

    Answers that write go first, each with one token; what is left of the step's tokens reads prompts, the oldest
    first. A request starts once there are blocks for all of its tokens so far. When a writing answer finds no free
    block, the youngest that runs gives its blocks back and is read again later.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, step_tokens: int, cuts_anywhere: bool) -> None:
        """Start with nothing to do.

        Args:
            max_running: answers that run at a time.
            step_tokens: tokens of a step, about.
            cuts_anywhere: whether what a step reads of a prompt may end anywhere; otherwise it ends at multiples of
                `step_tokens`, so that the cuts depend on the prompt alone, and a step may be longer by one such part.
        """
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        """The oldest first."""
        self.pool = pool
        self.max_running = max_running
        self.num_prompt_tokens = 0
        self.num_prefix_hits = 0
        self.num_preemptions = 0
        """All three as in `EngineStats`."""
        self._step_tokens = step_tokens
        self._cuts_anywhere = cuts_anywhere

    def add(self, answers: Sequence[Answer]) -> None:
        """Put answers at the end of the queue."""
        self.waiting.extend(answers)

    def plan(self) -> Step:
        """Return the next step, its blocks taken."""
        writing = self._find_writing()
        budget = self._step_tokens - len(writing)
        reading = []
        for answer in self.running:
            if budget > 0 and not answer.is_writing:
                reading.append((answer, self._part(answer, budget)))
                budget -= reading[-1][1]
        while budget > 0 and self.waiting and len(self.running) < self.max_running and self._start(self.waiting[0]):
            answer = self.waiting.popleft()
            reading.append((answer, self._part(answer, budget)))
            budget -= reading[-1][1]
        return Step(writing=writing, reading=reading)

    def computed(self, answer: Answer, num_tokens: int) -> None:
        """Count tokens as held, and make the blocks known that they filled."""
        answer.num_computed += num_tokens
        num_full = answer.num_computed // self.pool.block_size
        if num_full > answer.num_named:
            chain_keys(answer.tokens, self.pool.block_size, answer.keys)
            for index in range(answer.num_named, num_full):
                self.pool.name(answer.blocks[index], answer.keys[index])
            answer.num_named = num_full

    def release(self, answer: Answer) -> None:
        """Take an answer out, wherever it is; its blocks are free at once."""
        if answer.is_running:
            self.running.remove(answer)
            self._give_back(answer)
        else:
            self.waiting.remove(answer)

    def _find_writing(self) -> list[Answer]:
        """Return the answers that write, each with a block for its last token; the youngest may have to stop."""
        writing: list[Answer] = []
        for answer in list(self.running):
            if not (answer.is_running and answer.is_writing):
                continue
            while answer.is_running and len(answer.blocks) < self.pool.num_blocks_for(len(answer.tokens)):
                block = self.pool.take(1)
                if block is None:
                    self._preempt(self.running[-1])
                else:
                    answer.blocks += block
            if answer.is_running:
                writing.append(answer)
        return writing

    def _start(self, answer: Answer) -> bool:
        """Give an answer blocks for all of its tokens, known ones where there are any; return False if too few are."""
        shared: list[int] = []
        if not answer.wants_prompt:
            chain_keys(answer.tokens, self.pool.block_size, answer.keys)
            # The last token is always computed: the next one follows from its hidden state.
            shared = self.pool.share(answer.keys[: (len(answer.tokens) - 1) // self.pool.block_size])
        fresh = self.pool.take(self.pool.num_blocks_for(len(answer.tokens)) - len(shared))
        if fresh is None:
            self.pool.give_back(shared)
            return False
        answer.blocks = shared + fresh
        answer.num_named = len(shared)
        answer.num_computed = len(shared) * self.pool.block_size
        if answer.num_cached_tokens is None:
            answer.num_cached_tokens = min(answer.num_computed, answer.num_prompt)
            self.num_prompt_tokens += answer.num_prompt
            self.num_prefix_hits += answer.num_cached_tokens
        answer.is_running = True
        self.running.append(answer)
        return True

    def _part(self, answer: Answer, budget: int) -> int:
        """Return how many of an answer's tokens the step reads."""
        if self._cuts_anywhere:
            return min(answer.num_missing, budget)
        return min(answer.num_missing, self._step_tokens - answer.num_computed % self._step_tokens)

    def _preempt(self, answer: Answer) -> None:
        """Stop the youngest answer, which is older than all that wait, and let it start again before them."""
        self.running.remove(answer)
        self._give_back(answer)
        self.waiting.appendleft(answer)
        self.num_preemptions += 1

    def _give_back(self, answer: Answer) -> None:
        self.pool.give_back(answer.blocks)
        answer.blocks = []
        answer.num_computed = 0
        answer.num_named = 0
        answer.states = []
        answer.scores = []
        answer.is_running = False
