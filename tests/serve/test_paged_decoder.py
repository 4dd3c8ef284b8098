import random

import pytest
import torch

from ray_ds.model.decoder import Decoder
from ray_ds.serve.paged_decoder import PagedDecoder
from tests.model.models import KINDS, new_decoder

BLOCK = 16


def decoder(kind: str) -> Decoder:
    return new_decoder(KINDS[kind], scale=4.0).eval().requires_grad_(False)


def scattered(num_sequences: int, blocks_each: int) -> list[list[int]]:
    """Return the blocks of sequences, no two of one beside each other."""
    order = random.Random(0).sample(range(num_sequences * blocks_each), num_sequences * blocks_each)
    return [order[i::num_sequences] for i in range(num_sequences)]


@pytest.mark.parametrize("exactness", ["none", "batch", "schedule"])
@pytest.mark.parametrize("kind", ["latent", "dense", "v2", "grouped"])
@torch.inference_mode()
def test_logits_are_those_of_the_whole_sequence(kind: str, exactness) -> None:
    whole_model = decoder(kind)
    model = PagedDecoder(decoder(kind), num_blocks=15, block_size=BLOCK, max_len=80, exactness=exactness)
    blocks = scattered(3, 5)
    tokens = torch.randint(whole_model.config.vocab_size, (3, 80), generator=torch.Generator().manual_seed(2))
    whole = whole_model(tokens)  # (3, 80, V)
    lengths = [5, 70, 1]
    for row, length in enumerate(lengths):
        for start, end in ((0, min(length, 3)), (min(length, 3), length)):
            if end > start:
                hidden = model.read(blocks[row], start, tokens[row, start:end].tolist())
                torch.testing.assert_close(model.logits(hidden), whole[row, start:end], rtol=1e-4, atol=1e-5)
    for step in range(10):
        starts = [length + step for length in lengths]
        hidden = model.write(blocks, starts, [int(tokens[row, start]) for row, start in enumerate(starts)])
        wanted = torch.stack([whole[row, start] for row, start in enumerate(starts)])
        torch.testing.assert_close(model.logits(hidden), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["latent", "v2", "grouped"])
@torch.inference_mode()
def test_bits_do_not_depend_on_cuts_or_batch_mates(kind: str, dtype: torch.dtype) -> None:
    model = PagedDecoder(decoder(kind).to(dtype), num_blocks=64, block_size=BLOCK, max_len=128, exactness="schedule")
    blocks = scattered(8, 8)
    draw = random.Random(0)
    texts = [[draw.randrange(64) for _ in range(draw.randrange(3, 128))] for _ in blocks]
    alone = [model.logits(model.read(own, 0, text)) for own, text in zip(blocks, texts, strict=True)]
    for own, text, wanted in zip(blocks, texts, alone, strict=True):
        start = 0
        while start < len(text):
            part = text[start : start + draw.choice([1, 2, 7, 33, 100])]
            assert torch.equal(model.logits(model.read(own, start, part)), wanted[start : start + len(part)])
            start += len(part)
    starts = [draw.randrange(1, len(text)) for text in texts]
    while open_rows := [row for row, text in enumerate(texts) if starts[row] < len(text)]:
        rows = draw.sample(open_rows, draw.randrange(1, len(open_rows) + 1))
        found = model.logits(
            model.write(
                [blocks[row] for row in rows], [starts[row] for row in rows], [texts[row][starts[row]] for row in rows]
            )
        )
        assert torch.equal(found, torch.stack([alone[row][starts[row]] for row in rows]))
        for row in rows:
            starts[row] += 1


@torch.inference_mode()
def test_without_exactness_bits_do_depend_on_batch_mates() -> None:
    """So that the test above is known to see it."""
    model = PagedDecoder(decoder("latent"), num_blocks=64, block_size=BLOCK, max_len=128)
    blocks = scattered(8, 8)
    for row, own in enumerate(blocks):
        model.read(own, 0, [(7 * row + i) % 64 for i in range(10 + 9 * row)])
    starts = [10 + 9 * row for row in range(8)]
    together = model.logits(model.write(blocks, starts, [3] * 8))
    alone = [model.logits(model.write([own], [start], [3])) for own, start in zip(blocks, starts, strict=True)]
    assert not torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_what_is_no_number_is_wiped_and_does_not_reach_the_next_owner() -> None:
    model = PagedDecoder(decoder("latent"), num_blocks=2, block_size=BLOCK, max_len=32, exactness="schedule")
    wanted = model.read([0], 0, [1, 2, 3])
    for layer in model._cache.layers:
        layer.fill_(float("nan"))
    model.wipe([0, 1])
    assert torch.equal(model.read([0], 0, [1, 2, 3]), wanted)
