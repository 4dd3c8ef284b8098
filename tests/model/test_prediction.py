import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ray_ds.model.balance import expert_load, update_router_bias
from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import LossWeights
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.model.prediction import look_ahead
from tests.model.models import AHEAD, DENSE, batch, new_decoder

WEIGHTS = LossWeights(prediction=0.3)


def test_places_without_a_token_ahead_have_no_target():
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    targets = torch.tensor([[11, 12, IGNORED_TARGET, 14, 15, 16]])
    ahead, goals = look_ahead(tokens, targets, None, depth=1)
    assert ahead[0, :5].tolist() == [11, 12, 13, 14, 15]
    assert goals.tolist() == [[12, IGNORED_TARGET, 14, 15, 16, IGNORED_TARGET]]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    _, goals = look_ahead(tokens, targets, segments, depth=1)
    assert goals.tolist() == [[12, IGNORED_TARGET, IGNORED_TARGET, 15, 16, IGNORED_TARGET]]
    _, goals = look_ahead(tokens, targets, segments, depth=2)
    assert goals.tolist() == [[IGNORED_TARGET, IGNORED_TARGET, IGNORED_TARGET, 16, IGNORED_TARGET, IGNORED_TARGET]]


def test_loss_is_that_of_the_paper_written_out():
    decoder = new_decoder(AHEAD, scale=3, weights=WEIGHTS, kernels="plain")
    tokens, targets = batch(AHEAD)
    length = tokens.shape[1]
    loss = decoder(tokens, targets)
    hidden = decoder.hidden(tokens)
    main = F.cross_entropy(decoder.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    total = torch.zeros(())
    for depth, module in enumerate(decoder.model.layers[2:], start=1):
        kept = length - depth  # the chain of section 2.2: of h_1 to h_T only those with a token depth places on
        embedded = decoder.model.embed_tokens(tokens[:, depth:])
        joined = torch.cat((module.enorm(embedded), module.hnorm(hidden[:, :kept])), dim=-1) @ module.eh_proj.weight.T
        rotary, _ = decoder.model.surroundings(tokens[:, :kept])
        hidden = module.shared_head["norm"](module(joined, rotary)[0])
        logits = decoder.lm_head(hidden)
        total = total + F.cross_entropy(logits.flatten(0, 1), targets[:, depth:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, main + 0.3 / 2 * total, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(decoder.extra_losses, torch.stack((total / 2, torch.zeros(()))), rtol=1e-5, atol=1e-3)


def test_evaluation_has_the_plain_loss():
    decoder = new_decoder(AHEAD, weights=WEIGHTS).eval()
    tokens, targets = batch(AHEAD)
    wanted = F.cross_entropy(decoder(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(decoder(tokens, targets), wanted)


def test_every_parameter_gets_a_gradient_even_from_one_token():
    decoder = new_decoder(AHEAD, weights=WEIGHTS)
    decoder(*batch(AHEAD, rows=1, length=1)).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    decoder(*batch(AHEAD)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.any(), name


def test_the_routers_of_the_modules_are_balanced_too():
    decoder = new_decoder(AHEAD, weights=WEIGHTS)
    decoder(*batch(AHEAD)).backward()
    load = expert_load(decoder)
    assert load.sum(dim=1).tolist() == [60 * AHEAD.num_experts_per_tok] * 3
    update_router_bias(decoder, load, speed=0.1)
    assert all(layer.mlp.gate.e_score_correction_bias.any() for layer in decoder.model.layers[1:])


def rows_with_a_determined_second(generator: torch.Generator, rows: int) -> torch.Tensor:
    """Return rows in which odd places are random and an even place copies the one two before it, plus one."""
    tokens = torch.randint(16, (rows, 13), generator=generator)
    for place in range(2, 13, 2):
        tokens[:, place] = (tokens[:, place - 2] + 1) % 16
    return tokens


@pytest.mark.shows("Multi-token prediction learns the token after a random next one")
def test_it_predicts_the_token_behind_a_random_one():
    config = dataclasses.replace(DENSE, vocab_size=16, num_nextn_predict_layers=1)
    decoder = new_decoder(config, weights=LossWeights(prediction=1.0))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        rows = rows_with_a_determined_second(generator, 16)
        optimizer.zero_grad()
        (decoder(rows[:, :-1], rows[:, 1:]) / 192).backward()
        optimizer.step()
    decoder.eval()
    rows = rows_with_a_determined_second(generator, 32)
    hidden = decoder.hidden(rows[:, :-2])
    next_logits = decoder.lm_head(hidden)
    guesses, _ = decoder.draft(hidden, rows[:, 1:-1])
    even = slice(2, None, 2)  # at an even place the next token is random, and the one behind it is determined
    is_right = (guesses.argmax(-1) == rows[:, 2:])[:, even]
    assert is_right.float().mean() > 0.95
    assert (next_logits.argmax(-1) == rows[:, 1:-1])[:, even].float().mean() < 0.3


@torch.no_grad()
def test_drafting_with_a_cache_gives_the_guesses_of_a_whole_pass():
    decoder = new_decoder(AHEAD, scale=4).eval()
    tokens, targets = batch(AHEAD, rows=2, length=12)
    wanted, states = decoder.draft(decoder.hidden(tokens), targets)
    deeper, _ = decoder.draft(states, targets.roll(-1, 1), depth=2)
    cache = SlotCache(AHEAD, 2, 12, dtype=torch.float32, device="cpu", drafts=True)
    for start, stop in [(0, 7), *((place, place + 1) for place in range(7, 11))]:
        rows = cache.rows([1, 0], [stop - start] * 2)
        hidden = decoder.hidden(tokens[:, start:stop], cache=rows)
        found, states = decoder.draft(hidden, targets[:, start:stop], cache=rows)
        further, _ = decoder.draft(states, targets[:, start + 1 : stop + 1], depth=2, cache=rows)
        torch.testing.assert_close(found, wanted[:, start:stop], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(further, deeper[:, start:stop], rtol=1e-4, atol=1e-5)
