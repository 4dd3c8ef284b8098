"""Choosing the next tokens from logits, each row by its own rules and its own random number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_ds.serve.requests import SamplingParams


def draw_tokens(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Return one token a row.

    A row's result depends on that row alone. The token is found in the cumulative distribution in order of token id,
    so that rounding in the logits moves the borders a little and never reorders them.

    Args:
        logits: (B, V), -inf where a token may not come, which leaves one at least.
        draws: a number in [0, 1) a row; unused where the temperature is 0.
    """
    tokens = logits.argmax(dim=-1)  # (B,)
    rows = [row for row, own in enumerate(params) if own.temperature > 0]
    if rows:
        chosen = [params[row] for row in rows]
        probabilities = _keep_likely(_temper(logits[rows], chosen), chosen)  # (rows, V)
        cumulative = probabilities.cumsum(dim=-1)
        draw = torch.tensor([draws[row] for row in rows], dtype=torch.float64, device=logits.device)
        target = draw[:, None] * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens[rows] = found.clamp(max=logits.shape[-1] - 1)
    result: list[int] = tokens.tolist()
    return result


def _temper(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return probabilities (B, V) in fp64; subtracting the maximum first keeps a tiny temperature from overflowing."""
    temperature = torch.tensor([own.temperature for own in params], dtype=torch.float64, device=logits.device)
    shifted = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    return (shifted / temperature[:, None]).softmax(dim=-1)


def _keep_likely(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the probabilities (B, V), 0 where top_k, top_p or min_p leave a token out; not made to sum to 1."""
    kept = _keep_top(probabilities, params)
    if all(own.min_p <= 0 for own in params):
        return kept
    min_p = torch.tensor([own.min_p for own in params], dtype=torch.float64, device=probabilities.device)
    # No rule leaves the likeliest token out, so its probability before them all is the measure.
    return kept * (probabilities >= min_p[:, None] * probabilities.amax(dim=-1, keepdim=True))


def _keep_top(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the probabilities (B, V), 0 where top_k or top_p leave a token out."""
    num_tokens = probabilities.shape[-1]
    if all(own.top_k is None and own.top_p >= 1 for own in params):
        return probabilities
    device = probabilities.device
    top_k = torch.tensor([min(own.top_k or num_tokens, num_tokens) for own in params], device=device)
    top_p = torch.tensor([own.top_p for own in params], dtype=torch.float64, device=device)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (B, V)
    ranked = ranked * (torch.arange(num_tokens, device=device) < top_k[:, None])
    before = ranked.cumsum(dim=-1) - ranked
    # The likeliest token stays whatever top_p is: before it there is nothing.
    ranked = ranked * ((before < top_p[:, None] * ranked.sum(dim=-1, keepdim=True)) | (top_p[:, None] >= 1))
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)


def token_logprobs(logits: Tensor, token: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return a token's log-probability and the `num_top` likeliest (token, log-probability) of one row (V,)."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))
