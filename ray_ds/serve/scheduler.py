"""Which requests run: first come, first served, into as many slots as the cache has."""

import random
from collections import deque
from collections.abc import Sequence

from ray_ds.serve.requests import Emit, FinishReason, GenerationRequest, Piece, TokenLogprobs
from ray_ds.serve.text_stream import TextStream


class RunningAnswer:
    """A request on its way: what it has got so far, and where it lies in the cache."""

    def __init__(self, request: GenerationRequest, emit: Emit) -> None:
        self.request = request
        self.emit = emit
        self.random = random.Random(request.params.seed)
        self.text = TextStream(request.params.stop)
        self.slot = -1
        """Its slot in the cache; -1 while it waits."""
        self.num_prefilled = 0
        """Prompt tokens the cache holds."""
        self.num_sampled = 0
        self.last_token = -1
        """The token sampled last, which the next step feeds in."""
        self.num_unsent = 0
        """Tokens sampled since the last piece went out."""
        self.unsent_logprobs: list[TokenLogprobs] = []
        self.is_cancelled = False

    @property
    def is_prefilled(self) -> bool:
        """Tell whether the whole prompt is in the cache."""
        return self.num_prefilled == len(self.request.prompt)

    def take_piece(self, text: str, finish_reason: FinishReason | None) -> Piece:
        """Return `text` with all that was sampled since the piece before."""
        logprobs = tuple(self.unsent_logprobs)
        piece = Piece(text=text, num_tokens=self.num_unsent, logprobs=logprobs, finish_reason=finish_reason)
        self.num_unsent = 0
        self.unsent_logprobs = []
        return piece


class Scheduler:
    """The queue and the slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.waiting: deque[RunningAnswer] = deque()
        self.running: list[RunningAnswer] = []
        """Answers with a slot, the oldest first."""
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def add(self, answers: Sequence[RunningAnswer]) -> None:
        """Put answers at the end of the queue."""
        self.waiting.extend(answers)

    def admit(self) -> None:
        """Give every free slot to the one that has waited longest."""
        while self.waiting and self._free_slots:
            answer = self.waiting.popleft()
            answer.slot = self._free_slots.pop()
            self.running.append(answer)

    def release(self, answer: RunningAnswer) -> None:
        """Take an answer out, wherever it is; its slot is free at once."""
        if answer.slot < 0:
            self.waiting.remove(answer)
            return
        self.running.remove(answer)
        self._free_slots.append(answer.slot)
        answer.slot = -1
