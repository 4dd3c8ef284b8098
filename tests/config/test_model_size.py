import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_ds.config.model_size import cache_bytes_per_token, flops_per_token, num_active_parameters, num_parameters
from ray_ds.config.presets import PRESETS
from ray_ds.model.caches import LatentCache
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts

CASES = {
    **PRESETS,
    "tied": dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=True),
    "compressed query": dataclasses.replace(PRESETS["tiny"], q_lora_rank=24),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_what_torch_counts(name):
    config = CASES[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    biases = sum(b.numel() for n, b in decoder.named_buffers() if n.endswith("e_score_correction_bias"))
    assert num_parameters(config) == sum(p.numel() for p in decoder.parameters()) + biases

    routed = sum(p.numel() for m in decoder.modules() if isinstance(m, Experts) for p in m.parameters())
    chosen = routed * config.num_experts_per_tok // max(1, config.n_routed_experts)
    assert num_active_parameters(config) == num_parameters(config) - routed + chosen


def test_v3_has_the_published_size():
    assert num_parameters(PRESETS["v3"]) == 671_026_419_200
    assert round(num_active_parameters(PRESETS["v3"]) / 1e9) == 38  # published as 37, which leaves out the look-up


def test_lite_and_350m_have_the_sizes_of_their_names():
    assert round(num_parameters(PRESETS["lite"]) / 1e9, 1) == 15.7
    assert round(num_parameters(PRESETS["dense_350m"]) / 1e6) == 371


def test_flops_are_those_of_the_products_of_a_forward_pass_three_times():
    config = dataclasses.replace(PRESETS["demo_dense"], vocab_size=512)
    seq_len = 64
    decoder = Decoder(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.zeros(1, seq_len, dtype=torch.long))
    heads = config.num_hidden_layers * config.num_attention_heads
    upper_half = heads * (config.qk_head_dim + config.v_head_dim) * seq_len  # counted by torch, masked by causality
    norms = sum(p.numel() for p in decoder.parameters() if p.dim() == 1)
    counted = counter.get_total_flops() / seq_len - upper_half
    assert flops_per_token(config, seq_len) - 6 * norms == 3 * counted


def test_tying_changes_the_parameters_but_not_the_work():
    tied = CASES["tied"]
    assert num_parameters(tied) < num_parameters(PRESETS["tiny"])
    assert flops_per_token(tied, 128) == flops_per_token(PRESETS["tiny"], 128)


def test_cache_bytes_are_those_of_the_cache():
    config = PRESETS["demo"]
    cache = LatentCache(config, num_slots=3, max_len=10, dtype=torch.bfloat16, device="cpu")
    assert cache.latents.nbytes == 30 * cache_bytes_per_token(config, 2)
