"""How large activations become: the largest magnitude of each channel at every point that smoothing wants."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import Span, span_inputs
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts
from ray_ds.model.layers import RMSNorm
from ray_ds.quantize.folds import plan_folds

Maxima = dict[str, Tensor]
"""The largest magnitude of each channel, fp32 (K,), by `Fold.point`."""


def measure_maxima(decoder: Decoder, split: TokenSplit, spans: Sequence[Span]) -> Maxima:
    """Return the largest magnitudes that some text brings about, also in the modules of multi-token prediction."""
    device = decoder.model.embed_tokens.weight.device
    with _recording(decoder) as maxima, torch.inference_mode():
        # Rows of one length go together, so that there is no padding, whose activations no text has.
        for _, rows in itertools.groupby(spans, key=lambda span: span.num_targets):
            tokens = np.stack([span_inputs(split, span).astype(np.int64) for span in rows])  # (B, T)
            _run(decoder, torch.from_numpy(tokens).to(device))
    return {point: largest.cpu() for point, largest in maxima.items()}


def merge_maxima(parts: Iterable[Mapping[str, Tensor]]) -> Maxima:
    """Return the largest magnitudes of all parts: the same in whatever order they come."""
    merged: Maxima = {}
    for part in parts:
        for point, largest in part.items():
            merged[point] = torch.maximum(merged[point], largest) if point in merged else largest
    return merged


def _run(decoder: Decoder, tokens: Tensor) -> None:
    """Run every layer over `tokens` (B, T)."""
    hidden = decoder.hidden(tokens)  # (B, T, D)
    for depth in range(1, 1 + min(decoder.config.num_nextn_predict_layers, tokens.shape[1] - 1)):
        _, hidden = decoder.draft(hidden[:, :-1], tokens[:, depth:], depth=depth)  # (B, T - depth, D)


@contextmanager
def _recording(decoder: Decoder) -> Iterator[Maxima]:
    """Give a table that fills with the largest magnitudes of all that is computed meanwhile."""
    maxima: Maxima = {}

    def record(point: str, x: Tensor) -> None:
        largest = x.flatten(0, -2).abs().amax(dim=0).float()
        maxima[point] = torch.maximum(maxima[point], largest) if point in maxima else largest

    modules = dict(decoder.named_modules())
    points = [fold.point for fold in plan_folds(decoder.config) if fold.point in modules]
    handles = [_watch(modules[point], point, record) for point in points]
    handles += [_watch(module, path, record) for path, module in modules.items() if isinstance(module, Experts)]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, path: str, record: Callable[[str, Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Record what a norm gives, what a linear layer takes, or what the second products of experts take."""
    if isinstance(module, Experts):
        # Experts are stacked and have no modules of their own; what lies between their products is computed anew.
        return module.register_forward_pre_hook(lambda own, inputs: _record_experts(own, path, record, *inputs))
    if isinstance(module, RMSNorm):
        return module.register_forward_hook(lambda _own, _inputs, out: record(path, out))
    return module.register_forward_pre_hook(lambda _own, inputs: record(path, inputs[0]))


def _record_experts(
    experts: Experts, path: str, record: Callable[[str, Tensor], None], x: Tensor, _weights: Tensor, chosen: Tensor
) -> None:
    """Record what each chosen expert's `down_proj` takes, of tokens (N, D) that chose experts (N, K)."""
    for expert in sorted(set(chosen.flatten().tolist())):
        rows = x[(chosen == expert).any(dim=1)]
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        record(f"{path}.{expert}.down_proj", F.silu(gate) * up)
