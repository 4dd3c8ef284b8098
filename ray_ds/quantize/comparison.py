"""How far a quantized model is from its checkpoint, on text: the measures that the gates hold it to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import Span, span_inputs, span_targets
from ray_ds.model.decoder import Decoder
from ray_ds.model.loss import IGNORED_TARGET

MAX_LOGITS = 1 << 25
"""Logits of a model that are in memory at a time: 128 MiB in fp32."""
LARGEST_LOSS_GROWTH = 700.0
"""Nats a token; the exponential of more leaves the range of a float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models' predictions of the same tokens, each after the true ones before it (teacher-forced)."""

    tokens: int
    float_nats: float
    """Cross-entropy of the checkpoint, summed over tokens."""
    quantized_nats: float
    """Of the quantized model."""
    kl_nats: float
    """KL(checkpoint || quantized model), summed over tokens."""
    same_top1: int
    """Tokens before which both have the same likeliest one."""

    @property
    def perplexity(self) -> float:
        """Return the quantized model's."""
        return math.exp(min(self.quantized_nats / self.tokens, LARGEST_LOSS_GROWTH))

    @property
    def perplexity_ratio(self) -> float:
        """Return how many times the checkpoint's perplexity the quantized model's is."""
        return math.exp(min((self.quantized_nats - self.float_nats) / self.tokens, LARGEST_LOSS_GROWTH))

    @property
    def kl(self) -> float:
        """Return the mean divergence in nats a token."""
        return self.kl_nats / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Return the share of tokens with the same likeliest one."""
        return self.same_top1 / self.tokens


def compare(reference: Decoder, quantized: Decoder, split: TokenSplit, spans: Sequence[Span]) -> Comparison:
    """Compare two models on one micro-batch of spans; logits are never all in memory."""
    device = reference.model.embed_tokens.weight.device
    tokens = _pad([span_inputs(split, span) for span in spans], 0).to(device)  # (B, T)
    targets = _pad([span_targets(split, span) for span in spans], IGNORED_TARGET).to(device)  # (B, T)
    is_target = targets != IGNORED_TARGET
    wanted = targets[is_target]  # (M,)
    rows = max(1, MAX_LOGITS // reference.config.vocab_size)
    parts = []
    with torch.inference_mode():
        hidden = [model.hidden(tokens)[is_target] for model in (reference, quantized)]  # (M, D) each
        for goals, x, y in zip(*(torch.split(each, rows) for each in (wanted, *hidden)), strict=True):
            parts.append(_compare_logits(reference.lm_head(x).float(), quantized.lm_head(y).float(), goals))
    return merge_comparisons(parts)


def merge_comparisons(parts: Sequence[Comparison]) -> Comparison:
    """Return the comparison on all parts' tokens; sums of floats are exact, so the order makes no difference."""
    return Comparison(
        tokens=sum(part.tokens for part in parts),
        float_nats=math.fsum(part.float_nats for part in parts),
        quantized_nats=math.fsum(part.quantized_nats for part in parts),
        kl_nats=math.fsum(part.kl_nats for part in parts),
        same_top1=sum(part.same_top1 for part in parts),
    )


def _compare_logits(reference: Tensor, quantized: Tensor, targets: Tensor) -> Comparison:
    """Compare logits (M, V) of tokens with targets (M,)."""
    p, q = reference.log_softmax(dim=-1), quantized.log_softmax(dim=-1)
    nats = [-float(part.gather(1, targets[:, None]).double().sum()) for part in (p, q)]
    return Comparison(
        tokens=len(targets),
        float_nats=nats[0],
        quantized_nats=nats[1],
        kl_nats=float((p.exp() * (p - q)).sum(dim=-1).double().sum()),
        same_top1=int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()),
    )


def _pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Return rows of numbers as one tensor; a causal model does not see what stands behind a row before it."""
    return pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True, padding_value=value)
