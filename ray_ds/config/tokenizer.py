"""Settings of the tokenizer stage."""

from typing import Annotated

import pydantic

from ray_ds.config.settings import settings
from ray_ds.errors import ConfigError

NUM_SPECIAL_TOKENS = 7
"""Start, end, padding, and a token for each role in a conversation."""
MIN_VOCAB_SIZE = NUM_SPECIAL_TOKENS + 256
"""The special tokens and one token a byte, below which some text could not be written."""
MAX_VOCAB_SIZE = 1 << 32
"""What uint32, the wider type of token shards, can number."""


@settings
class TokenizerSettings:
    """Settings of the tokenizer stage."""

    vocab_size: int = 32768
    """Tokens to learn, special ones included; a small corpus gives fewer, and the artefact's facts say how many."""
    sample_bytes: Annotated[int, pydantic.Field(ge=1)] = 1 << 30
    """UTF-8 bytes of text to learn from, about: documents are taken by a hash of their ids. About 10 times as much
    memory is used."""
    check_documents: Annotated[int, pydantic.Field(ge=1)] = 512
    """Documents, about, whose text must come back unchanged and from which bytes per token is measured."""
    seed: int = 0
    """Selects other documents."""

    def __post_init__(self) -> None:
        """Refuse vocabularies that cannot write every text or do not fit into shards."""
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            allowed = f"must be from {MIN_VOCAB_SIZE} ({NUM_SPECIAL_TOKENS} special tokens and 256 bytes) to 2^32"
            raise ConfigError("vocab_size", self.vocab_size, allowed, "try 4096 for a small model, 32768 or more else")
