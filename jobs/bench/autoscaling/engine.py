"""A replica's engine as a simulation: no tokens, only how long they take."""

from collections import deque
from dataclasses import dataclass, field

from ray_ds.serve.requests import EngineStats


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """What a simulated engine can do; the defaults are those of a small model on a CPU."""

    max_running_requests: int = 8
    max_model_len: int = 2048
    prefill_tokens_per_s: float = 2000.0
    decode_tokens_per_s: float = 25.0
    """Of one answer alone."""
    batch_cost: float = 0.1
    """Each further answer in a step makes the step longer by this part."""

    def decode_rate(self, num_answers: int) -> float:
        """Return tokens a second of all answers together."""
        return num_answers * self.decode_tokens_per_s / (1 + (num_answers - 1) * self.batch_cost)

    def capacity(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Return the requests of this size that a full engine ends a second."""
        work_s = prompt_tokens / self.prefill_tokens_per_s + answer_tokens / self.decode_rate(self.max_running_requests)
        return 1 / work_s


@dataclass(kw_only=True)
class Request:
    """A request, and what became of it."""

    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    first_token_s: float | None = None
    finished_s: float | None = None
    is_cut_off: bool = False
    """Its replica went before it ended."""
    num_prefilled: float = field(default=0.0, repr=False)
    num_answered: float = field(default=0.0, repr=False)

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None where none came."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


class SimulatedEngine:
    """Continuous batching: prompts first come, first served, with half of the time while answers are being written."""

    def __init__(self, speed: EngineSpeed) -> None:
        self.speed = speed
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._num_tokens = 0.0
        self._num_prompt_tokens = 0.0
        self._num_steps = 0
        self._decode_rate = 0.0

    @property
    def num_requests(self) -> int:
        """Requests it holds."""
        return len(self.waiting) + len(self.running)

    def submit(self, request: Request) -> None:
        """Take a request."""
        self.waiting.append(request)

    def step(self, now_s: float, seconds: float) -> None:
        """Work from `now_s` on for some seconds."""
        while self.waiting and len(self.running) < self.speed.max_running_requests:
            self.running.append(self.waiting.popleft())
        decoding = [request for request in self.running if request.first_token_s is not None]
        spent = self._prefill(now_s, seconds / 2 if decoding else seconds)
        if decoding:
            self._decode_rate = self.speed.decode_rate(len(decoding))
            tokens = self._decode_rate * (seconds - spent) / len(decoding)
            for request in decoding:
                request.num_answered += tokens
                self._num_tokens += tokens
                if request.num_answered >= request.answer_tokens:
                    request.finished_s = now_s + seconds
                    self.running.remove(request)
        self._num_steps += 1

    def _prefill(self, now_s: float, budget_s: float) -> float:
        """Compute prompts for at most so many seconds; return how many it took."""
        spent = 0.0
        for request in self.running:
            if request.first_token_s is None and spent < budget_s:
                left = request.prompt_tokens - request.num_prefilled
                took = min(left / self.speed.prefill_tokens_per_s, budget_s - spent)
                request.num_prefilled += took * self.speed.prefill_tokens_per_s
                self._num_prompt_tokens += took * self.speed.prefill_tokens_per_s
                spent += took
                if request.num_prefilled >= request.prompt_tokens - 1e-6:
                    request.first_token_s = max(now_s, request.arrival_s) + spent
        return spent

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing."""
        requests = [*self.waiting, *self.running]
        is_measured = self._num_prompt_tokens > 0
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=round(sum(request.prompt_tokens - request.num_prefilled for request in requests)),
            num_cached_tokens=round(sum(request.num_prefilled + request.num_answered for request in self.running)),
            num_cache_tokens=self.speed.max_running_requests * self.speed.max_model_len,
            prefill_tokens_per_s=self.speed.prefill_tokens_per_s if is_measured else 0.0,
            decode_tokens_per_s=self._decode_rate,
            num_steps=self._num_steps,
            num_tokens=round(self._num_tokens),
            num_prompt_tokens=round(self._num_prompt_tokens),
            num_prefix_hits=0,
            num_preemptions=0,
        )
