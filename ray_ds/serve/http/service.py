"""What the routes share: the engine, the tokenizer, and who is being served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray_ds.chat.template import ChatTemplate
from ray_ds.serve.engine import TokenTable
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.metrics import ServingMetrics
from ray_ds.serve.safety.screened_engine import AnsweringEngine


class ServingTokenizer(TokenTable, Protocol):
    """What the routes ask of a tokenizer; `tokenizer.BpeTokenizer` is one."""

    bos_id: int
    eos_id: int
    pad_id: int

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the tokens that no text is encoded to, by their names."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that the model is given for a text."""


class ChatPrompts(Protocol):
    """What the routes ask of a chat template; `chat.encoding.ChatEncoder` is one."""

    template: ChatTemplate

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return messages as the prompt that an answer follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """Which model is served; a part of what `/health` says."""

    model_id: str
    digest: str
    """Of the Endpoint artefact: the model and the settings it is served with."""
    model_digest: str
    """Of the artefact that holds the model."""
    kind: str
    """`QuantizedModel` or `Checkpoint`."""
    integer_path: str | None
    """The way integer products are computed here; None for a model without any."""
    created: int
    """When it was loaded, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionService:
    """One model behind the API."""

    engine: AnsweringEngine
    tokenizer: ServingTokenizer
    card: ModelCard
    access: Access
    """Who may ask what."""
    max_body_bytes: int
    chat: ChatPrompts | None = None
    """How messages become a prompt; None for a model without a chat template."""
    metrics: ServingMetrics = field(init=False)
    """What `/metrics` says of this model."""

    def __post_init__(self) -> None:
        """Start counting."""
        object.__setattr__(self, "metrics", ServingMetrics(self.card.model_id, lambda: self.engine.stats))
