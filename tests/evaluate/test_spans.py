"""Every target is in one span, and its bytes are counted."""

from pathlib import Path

import numpy as np
import pytest

from ray_ds.data.shard_file import write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.evaluate.spans import count_bytes, plan_spans, span_inputs, span_targets, text_of
from ray_ds.tokenizer import train_bpe

TEXTS = ["In the beginning, 起初 👍🏽.", "", "the end of 1999 the end\n" * 5, "你好" * 9]
TOKENIZER = train_bpe(TEXTS, 300)


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    for shard, texts in enumerate((TEXTS[:3], TEXTS[3:], [""])):
        documents = [np.array([0, *TOKENIZER.encode(text)], np.uint16) for text in texts]
        write_shard(str(tmp_path / f"validation/{shard}.arrow"), documents, texts, np.uint16)
    return TokenSplit.open(str(tmp_path), "validation")


@pytest.mark.parametrize("seq_len", [1, 3, 10, 10_000])
def test_every_target_but_a_shards_first_is_there_once_in_order(split: TokenSplit, seq_len: int) -> None:
    spans = plan_spans(split, seq_len)
    for shard in range(split.num_shards):
        own = [span for span in spans if span.shard == shard]
        stream = split.shard_tokens(shard).tolist()
        assert [i for span in own for i in span_targets(split, span).tolist()] == stream[1:]
        assert [i for span in own for i in span_inputs(split, span).tolist()] == stream[:-1]
        assert all(span.num_targets <= seq_len for span in own)
    assert sum(span.num_targets for span in spans) == split.num_tokens - split.num_shards


def test_bytes_and_text_are_those_of_the_documents(split: TokenSplit) -> None:
    spans = plan_spans(split, 7)
    assert count_bytes(split, spans, TOKENIZER) == len("".join(TEXTS).encode())
    assert text_of(split, spans, TOKENIZER) == "".join(TEXTS).encode()


def test_limited_spans_are_spread_evenly(split: TokenSplit) -> None:
    spans, limited = plan_spans(split, 2), plan_spans(split, 2, 20)
    places = [spans.index(span) for span in limited]
    assert len(limited) == 10 and places[0] == 0 and len(set(places)) == 10
    assert max(np.diff(places)) - min(np.diff(places)) <= 1
    assert plan_spans(split, 2, 10**9) == spans
    assert len(plan_spans(split, 2, 1)) == 1
