import dataclasses

import torch

from ray_ds.config.presets import PRESETS
from ray_ds.model.balance import expert_load, max_violation, reset_expert_load, uncounted, update_router_bias
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

CONFIG = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=3, n_routed_experts=8, vocab_size=64)


def new_decoder(**options) -> Decoder:
    decoder = Decoder(CONFIG, **options)
    init_weights(decoder, seed=0)
    return decoder


def test_every_token_of_training_counts_once_for_each_of_its_experts():
    decoder = new_decoder()
    tokens = torch.randint(64, (4, 16))
    decoder(tokens)
    decoder(tokens, tokens).backward()
    load = expert_load(decoder)
    assert load.shape == (2, 8)
    assert load.dtype == torch.int64
    assert load.sum(dim=1).tolist() == [2 * 64 * CONFIG.num_experts_per_tok] * 2


def test_evaluation_does_not_count():
    decoder = new_decoder().eval()
    decoder(torch.randint(64, (4, 16)))
    assert not expert_load(decoder).any()


def test_uncounted_tokens_do_not_count():
    decoder = new_decoder()
    decoder(torch.randint(64, (2, 16)))
    before = expert_load(decoder)
    with uncounted(decoder):
        decoder(torch.randint(64, (4, 16)))
    assert before.any() and torch.equal(expert_load(decoder), before)


def test_recomputed_activations_count_once_and_change_no_gradient():
    tokens = torch.randint(64, (4, 16))
    plain, recomputing = new_decoder(), new_decoder(recompute_activations=True)
    for decoder in (plain, recomputing):
        decoder(tokens, tokens).backward()
    assert torch.equal(expert_load(plain), expert_load(recomputing))
    for ours, theirs in zip(recomputing.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_reset_starts_anew():
    decoder = new_decoder()
    decoder(torch.randint(64, (1, 4)))
    reset_expert_load(decoder)
    assert not expert_load(decoder).any()


def test_bias_goes_up_for_idle_and_down_for_busy_experts():
    decoder = new_decoder()
    load = torch.tensor([[8, 0, 4, 4, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1, 1, 1]])
    update_router_bias(decoder, load, speed=0.5)
    update_router_bias(decoder, load, speed=0.25)
    first, second = (layer.mlp.gate.e_score_correction_bias for layer in decoder.model.layers[1:])
    assert first.tolist() == [-0.75, 0.75, 0, 0, 0, 0, 0, 0]
    assert second.tolist() == [0] * 8


def test_a_dense_model_has_no_load():
    dense = Decoder(dataclasses.replace(PRESETS["tiny"], n_routed_experts=0, first_k_dense_replace=2))
    load = expert_load(dense)
    assert load.numel() == 0
    update_router_bias(dense, load, speed=1.0)


def train(speed: float) -> float:
    """Return MaxVio over the last 20 steps of training on tokens that each have four successors."""
    decoder = new_decoder()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(64, (64, 4), generator=generator)
    total = torch.zeros(2, 8, dtype=torch.int64)
    for step in range(60):
        tokens = [torch.randint(64, (16,), generator=generator)]
        for pick in torch.randint(4, (16, 16), generator=generator):
            tokens.append(successors[tokens[-1], pick])
        rows = torch.stack(tokens, dim=1)
        optimizer.zero_grad()
        (decoder(rows[:, :-1], rows[:, 1:]) / 256).backward()
        optimizer.step()
        load = expert_load(decoder)
        total += load if step >= 40 else 0
        update_router_bias(decoder, load, speed)
        reset_expert_load(decoder)
    return max_violation(total).mean().item()


def test_moving_the_bias_balances_the_experts():
    assert max_violation(torch.tensor([[6, 2, 2, 2]])).tolist() == [1.0]
    balanced, left_alone = train(speed=5e-3), train(speed=0.0)
    assert balanced < 0.5 * left_alone
