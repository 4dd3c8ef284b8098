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
    """Follows a script where the prompt starts with one of its keys, otherwise gives logits from a hash."""

    def __init__(self, num_slots: int = 4, max_len: int = 256) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.sequences: dict[int, list[int]] = {}
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.batch_sizes: list[int] = []
        self.gate = threading.Event()
        """Decoding waits while it is clear."""
        self.gate.set()
        self.breaks = False

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        assert len(tokens) <= 512
        self.sequences.setdefault(slot, []).extend(tokens)
        return self._logits(slot)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        assert self.gate.wait(10)
        if self.breaks:
            raise RuntimeError("out of memory")
        self.batch_sizes.append(len(slots))
        for slot, token in zip(slots, tokens, strict=True):
            self.sequences[slot].append(token)
            assert len(self.sequences[slot]) <= self.max_len
        return torch.stack([self._logits(slot) for slot in slots])

    def clear(self, slot: int) -> None:
        self.sequences.pop(slot, None)

    def _logits(self, slot: int) -> Tensor:
        sequence = self.sequences[slot]
        for prompt, script in self.scripts.items():
            if tuple(sequence[: len(prompt)]) == prompt:
                token = script[len(sequence) - len(prompt)]
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
    engine = Engine(model, tokenizer, max_queued=4)
    engine.start()
    yield engine
    model.gate.set()
    engine.close()
