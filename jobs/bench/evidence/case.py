"""What a case is given, and what it finds."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jobs.bench.evidence.corpus import Corpus
from jobs.bench.evidence.training import Recipe
from ray_ds.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases of a call share."""

    corpus: Corpus
    device: torch.device
    is_small: bool
    """Whether only to go through all of a case, with a model and steps too few for its claims to hold."""
    steps: int | None = None
    """Instead of the case's own number."""

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return a case's recipe as it is run here."""
        if self.is_small:
            recipe = dataclasses.replace(recipe, steps=4, rows=2, seq_len=16, warmup_steps=1)
        return recipe if self.steps is None else dataclasses.replace(recipe, steps=self.steps)

    def model(self, config: ModelConfig) -> ModelConfig:
        """Return a case's model as it is built here, for the corpus's characters."""
        config = dataclasses.replace(config, vocab_size=self.corpus.vocab_size)
        if not self.is_small:
            return config
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        }
        if config.attention == "gqa":
            sizes |= {"num_key_value_heads": 2, "head_dim": 16}
        if config.n_routed_experts:
            sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return dataclasses.replace(config, **sizes, first_k_dense_replace=min(config.first_k_dense_replace, 2))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came out of a case."""

    figures: Mapping[str, Any]
    claims: Mapping[str, bool]
    """What the case is there to show, in words, and whether it did."""


Case = Callable[[Setting], Finding]
