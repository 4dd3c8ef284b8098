"""The `config.json` of published models, as on huggingface.co, is read whole and asks for the published size.

Totals are those that the pages on huggingface.co state for the safetensors; DeepSeek-V3's there, 684,531,386,000,
counts the scales of its 8-bit weights too, of which it has 41,540,496.
"""

import math
from typing import Any

import pytest

from ray_ds.config.model import ModelConfig
from ray_ds.config.rope import Llama3Rope, Yarn
from ray_ds.model.hugging_face import config as config_module
from ray_ds.model.hugging_face import from_hf_config, to_hf_config
from ray_ds.model.hugging_face.shapes import copies_on_disk, shapes_on_disk

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE: dict[str, Any] = {
    **{name: value for name, value in DEEPSEEK_V3.items() if name not in ("quantization_config", "ep_size")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": None,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B: dict[str, Any] = {
    **QWEN2_5_7B,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "vocab_size": 151936,
}
PUBLISHED = {
    "DeepSeek-V3": (DEEPSEEK_V3, 684_489_845_504),
    "DeepSeek-V2-Lite": (V2_LITE, 15_706_484_224),
    "Llama-3.1-8B-Instruct": (LLAMA_3_1_8B, 8_030_261_248),
    "Qwen2.5-7B-Instruct": (QWEN2_5_7B, 7_615_616_512),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
}


@pytest.mark.shows("The configs of DeepSeek-V3, V2-Lite, Llama 3.1, Qwen2.5 and Qwen3 are read; their sizes come out")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_asks_for_the_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: list[str] = []
    monkeypatch.setattr(config_module, "log_event", lambda event, field, value: unknown.append(field))
    values, total = PUBLISHED[name]
    config = from_hf_config(values)
    assert not unknown
    assert sum(map(math.prod, shapes_on_disk(config).values())) == total
    assert from_hf_config(to_hf_config(config)) == config


def test_how_positions_are_stretched() -> None:
    v3, lite, llama = (from_hf_config(values) for values in (DEEPSEEK_V3, V2_LITE, LLAMA_3_1_8B))
    yarn = Yarn(kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    assert v3.rope_scaling == yarn
    assert isinstance(lite.rope_scaling, Yarn) and lite.rope_scaling.mscale == 0.707
    assert (llama.rope_theta, llama.rope_scaling) == (
        500000.0,
        Llama3Rope(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )


def test_a_module_that_predicts_repeats_embedding_and_head() -> None:
    config: ModelConfig = from_hf_config(DEEPSEEK_V3)
    assert copies_on_disk(config) == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }
