import dataclasses

import pytest
import torch

from ray_ds.config.presets import PRESETS
from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from tests.model.models import GROUPED

CONFIG = dataclasses.replace(PRESETS["tiny"], q_lora_rank=24, v_head_dim=24)


@pytest.fixture(scope="module", params=[CONFIG, GROUPED], ids=["latent", "grouped"])
def decoder(request) -> Decoder:
    decoder = Decoder(request.param)
    init_weights(decoder, seed=0)
    for parameter in decoder.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return decoder.eval().requires_grad_(False)


def new_cache(decoder, num_slots=4, max_len=40, dtype=torch.float32) -> SlotCache:
    return SlotCache(decoder.config, num_slots, max_len, dtype=dtype, device="cpu")


def sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(CONFIG.vocab_size, (length,), generator=generator) for length in lengths]


def prefill(decoder, cache, slot, tokens):
    return decoder(tokens[None], cache=cache.rows([slot], [len(tokens)]))[0]


def test_decoding_rows_of_mixed_lengths_gives_the_logits_of_whole_forwards(decoder):
    cache = new_cache(decoder)
    rows = sequences(30, 12, 21)
    starts, slots = [20, 2, 11], [2, 0, 3]
    for slot, start, row in zip(slots, starts, rows, strict=True):
        torch.testing.assert_close(
            prefill(decoder, cache, slot, row[:start]), decoder(row[None, :start])[0], rtol=1e-4, atol=1e-5
        )
    for step in range(10):
        tokens = torch.stack([row[start + step] for row, start in zip(rows, starts, strict=True)])[:, None]
        logits = decoder(tokens, cache=cache.rows(slots, [1, 1, 1]))[:, 0]
        whole = [decoder(row[None, : start + step + 1])[0, -1] for row, start in zip(rows, starts, strict=True)]
        torch.testing.assert_close(logits, torch.stack(whole), rtol=1e-4, atol=1e-5)
    assert cache.lengths == [12, 0, 30, 21]


def test_prefill_in_pieces_gives_the_logits_of_one(decoder):
    (row,) = sequences(30)
    cache = new_cache(decoder)
    pieces = [prefill(decoder, cache, 1, piece) for piece in row.split([7, 1, 22])]
    torch.testing.assert_close(torch.cat(pieces), decoder(row[None])[0], rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths_prefill_together(decoder):
    cache = new_cache(decoder)
    rows = sequences(9, 17)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    last = torch.tensor([8, 16])
    logits = decoder(tokens, cache=cache.rows([3, 1], [9, 17]), logit_positions=last)
    torch.testing.assert_close(logits, torch.stack([decoder(r[None])[0, -1] for r in rows]), rtol=1e-4, atol=1e-5)
    # The padding of the shorter row is overwritten by what it decodes.
    more = torch.tensor([[5], [6]])
    logits = decoder(more, cache=cache.rows([3, 1], [1, 1]))[:, 0]
    whole = [decoder(torch.cat((row, new))[None])[0, -1] for row, new in zip(rows, more, strict=True)]
    torch.testing.assert_close(logits, torch.stack(whole), rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates(decoder):
    rows = sequences(8, 30, 3)
    token = torch.tensor([[7]])
    alone, together = new_cache(decoder), new_cache(decoder)
    prefill(decoder, alone, 0, rows[0])
    for slot, row in enumerate(rows):
        prefill(decoder, together, slot, row)
    wanted = decoder(token, cache=alone.rows([0], [1]))
    found = decoder(token.expand(3, 1), cache=together.rows([1, 0, 2], [1, 1, 1]))
    torch.testing.assert_close(found[1:2], wanted, rtol=1e-5, atol=1e-6)


def test_a_cleared_slot_forgets_its_sequence(decoder):
    old, new = sequences(20, 6)
    cache = new_cache(decoder)
    prefill(decoder, cache, 0, old)
    cache.clear(0)
    torch.testing.assert_close(prefill(decoder, cache, 0, new), decoder(new[None])[0], rtol=1e-4, atol=1e-5)


def test_a_slot_holds_no_more_than_its_length(decoder):
    cache = new_cache(decoder, max_len=10)
    prefill(decoder, cache, 0, sequences(10)[0])
    with pytest.raises(AssertionError, match="too short"):
        cache.rows([0], [1])
    with pytest.raises(AssertionError, match="a slot of its own"):
        cache.rows([1, 1], [1, 1])


@pytest.mark.parametrize("batch", [1, 64])
def test_bf16_decodes_any_number_of_rows(decoder, batch):
    half = Decoder(decoder.config)
    half.load_state_dict(decoder.state_dict())
    half.eval().bfloat16()
    cache = new_cache(decoder, num_slots=batch, max_len=8, dtype=torch.bfloat16)
    slots = list(range(batch))
    tokens = torch.arange(3 * batch).view(batch, 3) % CONFIG.vocab_size
    with torch.no_grad():
        half(tokens, cache=cache.rows(slots, [3] * batch))
        logits = half(tokens[:, :1], cache=cache.rows(slots, [1] * batch))[:, 0]
        wanted = half(torch.cat((tokens, tokens[:, :1]), dim=1))[:, -1]
    assert logits.dtype == torch.float32
    assert (logits - wanted).abs().mean() < 0.05 * wanted.std()
