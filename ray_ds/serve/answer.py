"""A request on its way through the engine."""

import random
from collections import Counter

from torch import Tensor

from ray_ds.serve.requests import EmbeddingRequest, Emit, FinishReason, Piece, Request, SamplingParams, TokenLogprobs
from ray_ds.serve.text_stream import TextStream


class Answer:
    """What a request has got so far, and where its tokens lie in the cache."""

    def __init__(self, request: Request, emit: Emit) -> None:
        self.request = request
        self.emit = emit
        self.params: SamplingParams | None = None if isinstance(request, EmbeddingRequest) else request.params
        """None for a text that wants a vector."""
        self.random = random.Random(self.params.seed if self.params else None)
        self.text = TextStream(self.params.stop if self.params else ())
        self.tokens = list(request.prompt)
        """The prompt's and the answer's."""
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        """Tokens that the cache holds, from the first on."""
        self.blocks: list[int] = []
        """Where they lie; a running answer has blocks for all of `tokens`."""
        self.keys: list[bytes] = []
        """Of the full blocks of `tokens`, as far as they were asked for; see `chain_keys`."""
        self.num_named = 0
        """Blocks whose content the pool knows or was told."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache when it first ran; None until then."""
        self.counts: Counter[int] = Counter()
        """How often the answer has each token."""
        self.states: list[Tensor] = []
        """Hidden states (T, D) of what was read, of a text that wants a vector."""
        self.scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        """Of the prompt's tokens read so far, from the second on, where they are wanted: as from `token_logprobs`."""
        self.unsent: list[TokenLogprobs] = []
        self.num_unsent = 0
        """Tokens sampled since the last piece went out."""
        self.is_running = False
        self.is_cancelled = False

    @property
    def num_missing(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_sampled(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_prompt_missing(self) -> int:
        """Prompt tokens that the cache does not hold yet."""
        return max(self.num_prompt - self.num_computed, 0)

    @property
    def is_writing(self) -> bool:
        """Whether all but the token sampled last is in the cache."""
        return self.num_sampled > 0 and self.num_missing == 1

    @property
    def wants_prompt(self) -> bool:
        """Whether something is wanted of each token of the prompt, so that none may come from the cache."""
        return self.params is None or (self.params.prompt_logprobs is not None and self.num_sampled == 0)

    def take_piece(self, text: str, finish_reason: FinishReason | None) -> Piece:
        """Return `text` with all that was sampled since the piece before."""
        piece = Piece(
            text=text,
            num_tokens=self.num_unsent,
            logprobs=tuple(self.unsent),
            finish_reason=finish_reason,
            num_cached_tokens=self.num_cached_tokens or 0,
        )
        self.num_unsent = 0
        self.unsent = []
        return piece
