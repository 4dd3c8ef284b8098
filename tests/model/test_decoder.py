import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ray_ds.config.presets import PRESETS
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.model.loss import IGNORED_TARGET

MOE = dataclasses.replace(PRESETS["tiny"], q_lora_rank=24)
DENSE = dataclasses.replace(PRESETS["tiny"], n_routed_experts=0, first_k_dense_replace=2)
TIED = dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=True)
CONFIGS = pytest.mark.parametrize("config", [MOE, DENSE, TIED], ids=["moe", "dense", "tied"])


def new_decoder(config) -> Decoder:
    decoder = Decoder(config)
    init_weights(decoder, seed=0)
    return decoder


def batch(config, rows=3, length=20):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].clone()


@CONFIGS
def test_loss_is_the_summed_cross_entropy_of_the_logits(config):
    decoder = new_decoder(config)
    tokens, targets = batch(config)
    targets[0, :5] = IGNORED_TARGET
    wanted = F.cross_entropy(decoder(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = decoder(tokens, targets)
    assert loss.shape == ()
    torch.testing.assert_close(loss, wanted)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_gets_a_gradient_in_every_type(config, dtype):
    decoder = new_decoder(config).to(dtype)
    loss = decoder(*batch(config))
    assert loss.dtype == torch.float32
    assert loss.item() / 60 == pytest.approx(torch.tensor(config.vocab_size).log().item(), rel=0.02)
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@CONFIGS
def test_one_token_leaves_no_parameter_without_a_gradient(config):
    decoder = new_decoder(config)
    tokens, targets = batch(config, rows=1, length=1)
    decoder(tokens, targets).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype):
    decoder = new_decoder(MOE)
    tokens, _ = batch(MOE)
    with torch.no_grad():
        wanted = decoder(tokens)
        found = decoder.to(dtype)(tokens)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.02 * wanted.std()


@CONFIGS
def test_a_token_sees_only_the_tokens_before_it(config):
    decoder = new_decoder(config).eval()
    tokens, _ = batch(config, rows=1)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = decoder(tokens)[0], decoder(changed)[0]
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12], after[12])


def test_logits_of_one_position_a_row():
    decoder = new_decoder(MOE).eval()
    tokens, _ = batch(MOE)
    places = torch.tensor([0, 19, 7])
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens, logit_positions=places), decoder(tokens)[torch.arange(3), places])


def test_it_learns_a_row_by_heart():
    decoder = new_decoder(PRESETS["tiny"])
    tokens, targets = batch(PRESETS["tiny"], rows=2, length=24)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (decoder(tokens, targets) / targets.numel()).backward()
        optimizer.step()
    assert decoder(tokens, targets).item() / targets.numel() < 0.05
