"""A model that needs no weights: its logits are a function of the sequence in the slot, whatever else runs."""

import hashlib
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ray_ds.serve.engine import Engine

TEXT_TOKENS = (*(bytes([byte]) for byte in range(256)), b" the", b"\xe4\xb8", b"\xad", "中".encode(), b"ab", b"ca")


class ByteTokenizer:
    """BOS, EOS, PAD, the bytes, and some tokens of several bytes or parts of a character."""

    bos_id = 0
    eos_id = 1
    stop_ids = frozenset((0, 1))
    vocab_size = 3 + len(TEXT_TOKENS)

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id, *self.encode(text)]

    def token_bytes(self, token_id: int) -> bytes:
        return TEXT_TOKENS[token_id - 3] if token_id >= 3 else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")


class FakeModel:
    """Follows a script where the prompt starts with one of its keys, otherwise gives logits from a hash.

    Its hidden states are its logits. The cache is real, token by token, so that a block too few, one with two owners
    or one freed too early changes what comes out.
    """

    def __init__(self, num_sequences: int = 4, max_len: int = 256, block_size: int = 16) -> None:
        self.num_blocks = num_sequences * -(-max_len // block_size)
        self.block_size = block_size
        self.max_len = max_len
        self.cache = [[-1] * block_size for _ in range(self.num_blocks)]
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.batch_sizes: list[int] = []
        self.num_read = 0
        self.gate = threading.Event()
        """Writing waits while it is clear."""
        self.gate.set()
        self.breaks = False
        self.spoils: int | None = None
        """A token after which all is NaN."""

    def read(self, blocks: Sequence[int], start: int, tokens: Sequence[int]) -> Tensor:
        self.num_read += len(tokens)
        return torch.stack([self._add(blocks, start + i, token) for i, token in enumerate(tokens)])

    def write(self, blocks: Sequence[Sequence[int]], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        assert self.gate.wait(10)
        if self.breaks:
            raise RuntimeError("out of memory")
        self.batch_sizes.append(len(blocks))
        return torch.stack([self._add(*row) for row in zip(blocks, starts, tokens, strict=True)])

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def wipe(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.cache[block] = [-1] * self.block_size

    def _add(self, blocks: Sequence[int], at: int, token: int) -> Tensor:
        assert at < self.max_len
        self.cache[blocks[at // self.block_size]][at % self.block_size] = token
        sequence = [self.cache[blocks[i // self.block_size]][i % self.block_size] for i in range(at + 1)]
        return self.next_logits(sequence)

    def next_logits(self, sequence: list[int]) -> Tensor:
        """Return what follows a sequence."""
        if self.spoils in sequence:
            return torch.full((ByteTokenizer.vocab_size,), float("nan"))
        for prompt, script in self.scripts.items():
            at = len(sequence) - len(prompt)
            if tuple(sequence[: len(prompt)]) == prompt and 0 <= at < len(script):
                token = script[at]
                return torch.nn.functional.one_hot(torch.tensor(token), ByteTokenizer.vocab_size) * 50.0
        seed = int.from_bytes(hashlib.sha256(repr(sequence).encode()).digest()[:7], "little")
        logits = torch.randn(ByteTokenizer.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
        logits[:3] = -50.0  # ends only where a script says so
        return logits


@pytest.fixture
def fake_model() -> type[FakeModel]:
    return FakeModel


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def engine(model: FakeModel, tokenizer: ByteTokenizer) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, max_running=4, max_queued=4)
    engine.start()
    yield engine
    model.gate.set()
    engine.close()
