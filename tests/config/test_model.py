import dataclasses

import pytest

from ray_ds.config.model import ModelConfig
from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.presets import PRESETS
from ray_ds.config.settings import field_docs
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
        ({"preset": "demo_dense", "n_routed_experts": 4}, r"num_experts_per_tok \(0\) must be 1 or more"),
    ],
)
def test_settings_that_make_no_model_or_have_no_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelSettings(**settings)


def test_a_dense_config_has_no_sparse_layers():
    with pytest.raises(
        ConfigError, match=r"first_k_dense_replace \(1\) must be num_hidden_layers \(2\) in a dense model"
    ):
        dataclasses.replace(PRESETS["tiny"], n_routed_experts=0)
