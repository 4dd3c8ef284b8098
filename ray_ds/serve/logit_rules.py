"""What a request does to its logits before a token is drawn: biases, penalties, tokens that may not come yet."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ray_ds.serve.requests import SamplingParams


def apply_rules(
    logits: Tensor,
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    counts: Mapping[int, int],
    banned: Collection[int],
) -> Tensor:
    """Return one row of logits (V,) after `logit_bias`, the penalties and the ban, in this order.

    Args:
        prompt: the prompt's tokens.
        counts: how often the answer has each token.
        banned: tokens that may not come.
    Source: repetition as in CTRL, arXiv 1909.05858; presence and frequency as in OpenAI's API; the order is vLLM's.
    """
    num_tokens = len(logits)
    if not (params.logit_bias or banned or _has_penalties(params)):
        return logits
    logits = logits.clone()
    if params.logit_bias:
        tokens, values = zip(*params.logit_bias, strict=True)
        logits[list(tokens)] += torch.tensor(values, device=logits.device)
    if params.repetition_penalty != 1.0:
        seen = sorted({token for token in (*prompt, *counts) if token < num_tokens})
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    if counts and (params.presence_penalty or params.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[list(counts)] -= params.frequency_penalty * times + params.presence_penalty
    logits[[token for token in banned if token < num_tokens]] = float("-inf")
    return logits


def _has_penalties(params: SamplingParams) -> bool:
    has_added = params.presence_penalty != 0 or params.frequency_penalty != 0
    return has_added or params.repetition_penalty != 1.0
