import dataclasses

import pytest

from ray_ds.config.model import ModelConfig
from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.presets import PRESETS
from ray_ds.config.rope import Llama3Rope, Yarn
from ray_ds.config.settings import as_json, decode_settings, field_docs
from ray_ds.errors import ConfigError


def resolve(**settings) -> ModelConfig:
    return ModelSettings(**settings).resolve(vocab_size=1000, max_position_embeddings=64)


def test_vocabulary_and_length_come_from_the_caller():
    config = resolve(preset="demo")
    assert (config.vocab_size, config.max_position_embeddings) == (1000, 64)
    rest = dataclasses.replace(config, vocab_size=4096, max_position_embeddings=256)
    assert rest == PRESETS["demo"]


def test_given_fields_override_the_preset():
    config = resolve(preset="tiny", hidden_size=96, q_lora_rank=24, norm_topk_prob=False)
    assert (config.hidden_size, config.q_lora_rank, config.norm_topk_prob) == (96, 24, False)
    assert config.kv_lora_rank == PRESETS["tiny"].kv_lora_rank


def test_query_rank_zero_means_no_compression():
    assert resolve(preset="deepseek_v3", q_lora_rank=0).q_lora_rank is None


def test_a_dense_model_follows_its_number_of_layers():
    config = resolve(preset="demo_dense", num_hidden_layers=6)
    assert (config.first_k_dense_replace, config.num_moe_layers) == (6, 0)


def test_a_preset_loses_its_experts_with_the_last_of_them():
    config = resolve(preset="demo", n_routed_experts=0)
    assert (config.n_shared_experts, config.num_experts_per_tok, config.num_moe_layers) == (0, 0, 0)


def test_every_override_is_a_field_of_the_model_and_documented():
    docs = field_docs(ModelSettings)
    names = {field.name for field in dataclasses.fields(ModelSettings)} - {"preset"}
    assert names == {field.name for field in dataclasses.fields(ModelConfig)} - {
        "vocab_size",
        "max_position_embeddings",
    }
    assert all(docs[name] for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preset": "huge"},
            r"preset \(huge\) must be one of tiny, demo, demo_dense, laptop, .*deepseek_v3; choose one",
        ),
        (
            {"preset": "demo_dense", "num_experts_per_tok": 2},
            r"num_experts_per_tok \(2\) has no effect in a dense model",
        ),
        (
            {"preset": "demo", "n_routed_experts": 0, "topk_group": 1},
            r"topk_group \(1\) has no effect in a dense model",
        ),
        (
            {"preset": "tiny", "first_k_dense_replace": 0, "intermediate_size": 9},
            r"intermediate_size \(9\) has no effect",
        ),
        ({"preset": "tiny", "hidden_size": 0}, r"hidden_size \(0\) must be positive; raise it"),
        ({"preset": "tiny", "q_lora_rank": -1}, r"q_lora_rank \(-1\) must be positive"),
        ({"preset": "tiny", "rope_theta": -1.0}, r"rope_theta \(-1.0\) must be positive"),
        ({"preset": "tiny", "qk_rope_head_dim": 7}, r"qk_rope_head_dim \(7\) must be even; add 1"),
        ({"preset": "tiny", "n_routed_experts": -4}, r"n_routed_experts \(-4\) must be 0 or more"),
        ({"preset": "tiny", "n_shared_experts": -1}, r"n_shared_experts \(-1\) must be 0 or more; use 0 for none"),
        ({"preset": "tiny", "routed_scaling_factor": 0.0}, r"routed_scaling_factor \(0.0\) must be positive"),
        ({"preset": "tiny", "first_k_dense_replace": 2}, r"first_k_dense_replace \(2\) must be at least 0 and below"),
        (
            {"preset": "tiny", "n_group": 3},
            r"n_group \(3\) must divide n_routed_experts \(4\) into groups of 2 or more",
        ),
        ({"preset": "tiny", "n_group": 2, "topk_group": 3}, r"topk_group \(3\) must be at most n_group \(2\)"),
        (
            {"preset": "tiny", "n_group": 2, "num_experts_per_tok": 3},
            r"num_experts_per_tok \(3\) must be at most the 2",
        ),
        ({"preset": "tiny", "head_dim": 8}, r"head_dim \(8\) has no effect where attention is mla; remove it"),
        ({"preset": "llama_1b", "kv_lora_rank": 8}, r"kv_lora_rank \(8\) has no effect where attention is gqa"),
        (
            {"preset": "llama_1b", "num_key_value_heads": 3},
            r"num_key_value_heads \(3\) must divide num_attention",
        ),
        ({"preset": "llama_1b", "head_dim": 7}, r"head_dim \(7\) must be even; add 1"),
        ({"preset": "tiny", "attention": "gqa"}, r"num_key_value_heads \(0\) must be positive; raise it"),
        ({"preset": "tiny", "num_nextn_predict_layers": -1}, r"num_nextn_predict_layers \(-1\) must be 0 or more"),
        (
            {"preset": "tiny", "topk_method": "greedy", "n_group": 2},
            r"n_group \(2\) has no effect where topk_method is greedy; use 1",
        ),
        ({"preset": "demo_dense", "scoring_func": "softmax"}, r"scoring_func \(softmax\) has no effect in a dense"),
        ({"preset": "demo_dense", "n_routed_experts": 4}, r"num_experts_per_tok \(0\) must be 1 or more"),
    ],
)
def test_settings_that_make_no_model_or_have_no_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelSettings(**settings)


def test_a_preset_loses_the_sizes_of_the_attention_it_is_rid_of():
    grouped = resolve(preset="tiny", attention="gqa", num_key_value_heads=1, head_dim=32)
    assert (grouped.kv_lora_rank, grouped.v_head_dim, grouped.qk_head_dim) == (0, 0, 32)
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    latent = resolve(preset="llama_369m", attention="mla", **sizes)
    assert (latent.head_dim, latent.num_key_value_heads, latent.qk_head_dim) == (0, 0, 48)


def test_positions_are_stretched_by_a_table_of_the_recipe():
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    decoded = decode_settings(ModelSettings, {"preset": "tiny", "rope_scaling": scaling}, where="model")
    config = decoded.resolve(vocab_size=9, max_position_embeddings=256)
    assert config.rope_scaling == Yarn(kind="yarn", factor=4.0, original_max_position_embeddings=64)
    assert decode_settings(ModelConfig, as_json(config), where="config") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"rope_scaling.factor \(0.5\) must be 1 or more; leave rope_scaling out"),
        ({"original_max_position_embeddings": 0}, r"original_max_position_embeddings \(0\) must be positive; give"),
        ({"beta_slow": 40.0}, r"beta_slow \(40.0\) must be positive and below beta_fast \(32.0\)"),
    ],
)
def test_a_stretch_that_is_none_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Yarn(**{"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **changes})


def test_llama3_wavelengths_are_in_order():
    with pytest.raises(ConfigError, match=r"low_freq_factor \(4.0\) must be positive and below high_freq_factor"):
        Llama3Rope(
            kind="llama3",
            factor=8.0,
            low_freq_factor=4.0,
            high_freq_factor=1.0,
            original_max_position_embeddings=64,
        )


def test_a_dense_config_has_no_sparse_layers():
    with pytest.raises(
        ConfigError, match=r"first_k_dense_replace \(1\) must be num_hidden_layers \(2\) in a dense model"
    ):
        dataclasses.replace(PRESETS["tiny"], n_routed_experts=0)
