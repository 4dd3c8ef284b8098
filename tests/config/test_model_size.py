import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_ds.config.model_size import (
    cache_bytes_per_token,
    flops_per_token,
    num_active_parameters,
    num_parameters,
    num_prediction_parameters,
)
from ray_ds.config.presets import PRESETS
from ray_ds.model.block import PredictionBlock
from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import Decoder, LossWeights
from ray_ds.model.experts import Experts

GROUPED = dataclasses.replace(
    PRESETS["llama_369m"], vocab_size=512, num_hidden_layers=3, first_k_dense_replace=3, num_key_value_heads=2
)
CASES = {
    **PRESETS,
    "tied": dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=True),
    "compressed query": dataclasses.replace(PRESETS["tiny"], q_lora_rank=24),
    "biases and norms of heads": dataclasses.replace(GROUPED, qkv_bias=True, qk_norm=True),
    "no shared experts, greedy": dataclasses.replace(PRESETS["tiny"], n_shared_experts=0, topk_method="greedy"),
    "prediction modules": dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=2),
    "prediction module of a dense model": dataclasses.replace(GROUPED, num_nextn_predict_layers=1),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_what_torch_counts(name):
    config = CASES[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    biases = sum(b.numel() for n, b in decoder.named_buffers() if n.endswith("e_score_correction_bias"))
    assert num_parameters(config) == sum(p.numel() for p in decoder.parameters()) + biases

    modules = [m for m in decoder.modules() if isinstance(m, PredictionBlock)]
    ahead = sum(t.numel() for m in modules for n, t in m.state_dict().items())
    assert num_prediction_parameters(config) == ahead
    main = decoder.model.layers[: config.num_hidden_layers]
    routed = sum(p.numel() for m in main.modules() if isinstance(m, Experts) for p in m.parameters())
    chosen = routed * config.num_experts_per_tok // max(1, config.n_routed_experts)
    assert num_active_parameters(config) == num_parameters(config) - ahead - routed + chosen


@pytest.mark.shows("The published DeepSeek models are presets of exactly the published sizes")
def test_published_models_have_the_published_sizes():
    # github.com/deepseek-ai/DeepSeek-V3, README: 671B total, 37B activated; 685B in Hugging Face's folder: with the
    # prediction module, its copies of embedding and output projection, and a scale for every 128 x 128 FP8 weights.
    v3 = PRESETS["deepseek_v3"]
    assert num_parameters(v3) - num_prediction_parameters(v3) == 671_026_419_200
    table = v3.vocab_size * v3.hidden_size
    in_folder = num_parameters(v3) + 2 * table
    assert round((in_folder + in_folder / 128**2) / 1e9) == 685
    assert round((num_active_parameters(v3) - table) / 1e9) == 37

    # huggingface.co/deepseek-ai/DeepSeek-V2: 236B total, 21B activated; V2-Lite: 16B (15.7B in arXiv 2405.04434,
    # appendix B), 2.4B activated for each token, which leaves out the embedding's look-up.
    v2, lite = PRESETS["deepseek_v2"], PRESETS["deepseek_v2_lite"]
    assert num_parameters(v2) == 235_741_434_880
    assert round(num_active_parameters(v2) / 1e9) == 21
    assert num_parameters(lite) == 15_706_484_224
    assert 2.4e9 < num_active_parameters(lite) - lite.vocab_size * lite.hidden_size < 2.5e9


def test_own_presets_have_the_sizes_of_their_names():
    sizes = {name: num_parameters(config) for name, config in PRESETS.items()}
    assert round(sizes["dense_350m"] / 1e6) == 371
    assert sizes["llama_369m"] // 10**6 == 369
    assert round(sizes["llama_1b"] / 1e9, 1) == 0.9
    assert round(sizes["moe_1b"] / 1e9, 2) == 1.26
    assert round(sizes["flash_mla_1b"] / 1e9, 1) == 1.2
    assert 20e6 < sizes["laptop"] < 40e6
    assert (PRESETS["flash_mla_1b"].kv_lora_rank, PRESETS["flash_mla_1b"].qk_rope_head_dim) == (512, 64)


def test_sizes_need_no_torch():
    program = """
import sys
from ray_ds.config.model_size import cache_bytes_per_token, flops_per_token, num_active_parameters, num_parameters
from ray_ds.config.presets import PRESETS
for config in PRESETS.values():
    num_parameters(config), num_active_parameters(config)
    flops_per_token(config, 2048), cache_bytes_per_token(config, 2)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PRESETS["demo_dense"], vocab_size=512),
        GROUPED,
        dataclasses.replace(PRESETS["demo_dense"], vocab_size=512, num_nextn_predict_layers=1),
    ],
    ids=["latent", "grouped", "prediction"],
)
def test_flops_are_those_of_the_products_of_a_forward_pass_three_times(config):
    seq_len = 64
    decoder = Decoder(config, kernels="plain", weights=LossWeights(prediction=1.0))
    tokens = torch.zeros(1, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens, tokens)
    heads = (config.num_hidden_layers + config.num_nextn_predict_layers) * config.num_attention_heads
    upper_half = heads * (config.qk_head_dim + config.value_head_dim) * seq_len  # counted by torch, masked by causality
    norms = sum(p.numel() for p in decoder.parameters() if p.dim() == 1)
    counted = counter.get_total_flops() / seq_len - upper_half
    assert flops_per_token(config, seq_len) - 6 * norms == 3 * counted


def test_tying_changes_the_parameters_but_not_the_work():
    tied = CASES["tied"]
    assert num_parameters(tied) < num_parameters(PRESETS["tiny"])
    assert flops_per_token(tied, 128) == flops_per_token(PRESETS["tiny"], 128)


@pytest.mark.parametrize("config", [PRESETS["demo"], GROUPED], ids=["latent", "grouped"])
def test_cache_bytes_are_those_of_the_cache(config):
    cache = SlotCache(config, num_slots=3, max_len=10, dtype=torch.bfloat16, device="cpu")
    assert cache.vectors.nbytes == 30 * cache_bytes_per_token(config, 2)
