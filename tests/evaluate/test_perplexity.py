"""Loss, perplexity and bits per byte against sums done by hand, for any batch, row length and worker."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_ds.config.model import ModelConfig
from ray_ds.data.shard_file import write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.perplexity import LossModel, Score, bits_per_byte, micro_batches, sum_loss
from ray_ds.evaluate.spans import Span, plan_spans, span_inputs, span_targets
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

V = 19


class BigramTable(nn.Module):
    """A model whose loss anyone can compute: logits are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forward(self, tokens: Tensor, *, targets: Tensor) -> Tensor:
        logits = self.table[tokens].flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    rng = np.random.default_rng(0)
    for shard, length in enumerate((101, 7, 1, 64)):
        tokens = rng.integers(0, V, length).astype(np.uint16)
        write_shard(str(tmp_path / f"validation/{shard}.arrow"), [tokens], ["a"], np.uint16)
    return TokenSplit.open(str(tmp_path), "validation")


def sum_nats(model: LossModel, split: TokenSplit, spans: Sequence[Span], micro_batch: int) -> float:
    return math.fsum(sum_loss(model, split, batch) for batch in micro_batches(spans, micro_batch))


@pytest.mark.parametrize(("seq_len", "micro_batch"), [(1, 1), (5, 3), (16, 4), (1000, 2), (16, 1000)])
def test_loss_is_the_sum_over_every_target(split: TokenSplit, seq_len: int, micro_batch: int) -> None:
    model = BigramTable()
    probabilities = torch.softmax(model.table, -1).numpy()
    expected = 0.0
    for shard in range(split.num_shards):
        stream = split.shard_tokens(shard).tolist()
        expected -= sum(math.log(probabilities[a, b]) for a, b in pairwise(stream))
    spans = plan_spans(split, seq_len)
    score = Score(nats=sum_nats(model, split, spans, micro_batch), tokens=100 + 6 + 63, bytes=400)
    assert sum(span.num_targets for span in spans) == score.tokens
    assert score.nats == pytest.approx(expected, rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(expected / 169), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(expected / 400 / math.log(2), rel=1e-12)


def test_padding_of_short_rows_does_not_change_a_decoder(split: TokenSplit) -> None:
    config = ModelConfig(
        vocab_size=V,
        max_position_embeddings=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        first_k_dense_replace=2,
    )
    decoder = Decoder(config)
    init_weights(decoder, 0)
    decoder.eval()
    spans = plan_spans(split, 48)
    one_by_one = 0.0
    with torch.no_grad():
        for span in spans:
            logits = decoder(torch.from_numpy(span_inputs(split, span).astype(np.int64))[None])[0].double()
            targets = torch.from_numpy(span_targets(split, span).astype(np.int64))
            one_by_one -= torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets].sum().item()
    assert sum_nats(decoder, split, spans, micro_batch=3) == pytest.approx(one_by_one, rel=1e-5)


def test_uniform_guessing_costs_log2_of_the_vocabulary() -> None:
    score = Score(nats=1000 * math.log(256), tokens=1000, bytes=1000)
    assert score.perplexity == pytest.approx(256)
    assert score.bits_per_byte == pytest.approx(8) == bits_per_byte(1000 * math.log(256), 1000)
