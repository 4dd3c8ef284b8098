"""A service whose model goes on with the alphabet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_ds.config.keys import ApiKey
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.service import CompletionService, ModelCard
from ray_ds.serve.keys import KeyRing, hash_api_key
from ray_ds.serve.limits import LocalLedger
from tests.serve.http.conftest import ServedTokenizer
from tests.serve.http.teacher import TeacherEngine


def letters_service() -> CompletionService:
    tokenizer = ServedTokenizer()

    def logits(sequence: Sequence[int]) -> Tensor:
        """The token after another is the next letter."""
        return torch.nn.functional.one_hot(torch.tensor(sequence) + 1, tokenizer.vocab_size + 1) * 9.0

    card = ModelCard(
        model_id="team/tiny", digest="0123", model_digest="4567", kind="Checkpoint", integer_path=None, created=1
    )
    keys = KeyRing({"test": ApiKey(sha256=hash_api_key("sk-test"))}, None)
    access = Access(keys=keys, ledger=LocalLedger(), request_timeout_s=60)
    engine = TeacherEngine(logits, tokenizer)
    return CompletionService(engine=engine, tokenizer=tokenizer, card=card, access=access, max_body_bytes=10_000)
