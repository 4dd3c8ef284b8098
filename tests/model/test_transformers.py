"""The decoder against transformers' models with the same random weights."""

import dataclasses
import os

import pytest
import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.config.rope import LinearRope, Llama3Rope, RopeScaling, Yarn
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

os.environ["HF_HUB_OFFLINE"] = "1"

GROUPED = ModelConfig(
    attention="gqa",
    vocab_size=211,
    max_position_embeddings=256,
    hidden_size=60,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    intermediate_size=88,
    first_k_dense_replace=2,
    rms_norm_eps=1e-5,
)
LATENT = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=60,
    vocab_size=211,
    max_position_embeddings=256,
    num_attention_heads=3,
    q_lora_rank=24,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-5,
)
V2 = dataclasses.replace(LATENT, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
YARN = Yarn(kind="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = Llama3Rope(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def rope(config: ModelConfig) -> dict[str, object]:
    """Return the rotary parameters as transformers names them."""
    scaling: RopeScaling | None = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    values = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    return {"rope_type": values.pop("kind"), "rope_theta": config.rope_theta, **values}


def fields(config: ModelConfig) -> dict[str, object]:
    """Return the fields that all families share."""
    names = (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {**{name: getattr(config, name) for name in names}, "rope_parameters": rope(config)}


def random_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder in evaluation mode with large random weights, norms, biases and router biases."""
    decoder = Decoder(config)
    init_weights(decoder, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in decoder.state_dict().items():
        if tensor.dim() > 1:
            tensor.mul_(4)
        else:
            size = 0.02 if name.endswith("correction_bias") else 0.2
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    return decoder.eval()


def compare(config: ModelConfig, theirs: torch.nn.Module) -> None:
    """Make sure that both give the same logits with the same weights."""
    decoder = random_decoder(config)
    state = {name: tensor for name, tensor in decoder.state_dict().items()}
    theirs.load_state_dict(state)
    tokens = torch.randint(config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, wanted = decoder(tokens), theirs.eval()(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.shows("Dense decoders of Llama's, Qwen2's and Qwen3's kind give transformers' logits, to 1e-5")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 5e5},
        {"rope_scaling": YARN},
        {"rope_scaling": dataclasses.replace(YARN, attention_factor=0.8, beta_fast=8.0, beta_slow=2.0)},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LinearRope(kind="linear", factor=3.0)},
    ],
    ids=["plain", "every head its own", "one for all, tied", "yarn", "yarn with factor", "llama3", "linear"],
)
def test_llama(changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dataclasses.replace(GROUPED, **changes)
    heads = {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    compare(config, LlamaForCausalLM(LlamaConfig(**fields(config), **heads)))


def test_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = dataclasses.replace(GROUPED, qkv_bias=True, num_attention_heads=6, head_dim=10)
    compare(config, Qwen2ForCausalLM(Qwen2Config(**fields(config), num_key_value_heads=2)))


def test_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = dataclasses.replace(GROUPED, qk_norm=True)
    compare(config, Qwen3ForCausalLM(Qwen3Config(**fields(config), num_key_value_heads=2, head_dim=14)))


def latent_fields(config: ModelConfig) -> dict[str, object]:
    """Return the fields of DeepSeek's families."""
    names = (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "norm_topk_prob",
    )
    own = {name: getattr(config, name) for name in names}
    return {**fields(config), **own, "num_key_value_heads": config.num_attention_heads}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"topk_method": "group_limited_greedy", "n_group": 12, "topk_group": 5},
        {"rope_scaling": dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707)},
        {"rope_scaling": dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5)},
    ],
    ids=["greedy", "four groups", "groups of one", "yarn", "yarn with a factor"],
)
def test_deepseek_v2(changes):
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = dataclasses.replace(V2, **changes)
    compare(config, DeepseekV2ForCausalLM(DeepseekV2Config(**latent_fields(config), topk_method=config.topk_method)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 3, "topk_group": 2, "num_attention_heads": 5},
        {"rope_scaling": dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0), "norm_topk_prob": False},
    ],
    ids=["one group", "three groups", "yarn"],
)
def test_deepseek_v3(changes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = dataclasses.replace(LATENT, **changes)
    compare(config, DeepseekV3ForCausalLM(DeepseekV3Config(**latent_fields(config))))


def test_grouped_attention_with_softmax_experts_is_qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = dataclasses.replace(
        GROUPED,
        qk_norm=True,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        first_k_dense_replace=0,
        scoring_func="softmax",
        topk_method="greedy",
    )
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    heads = {"num_key_value_heads": 2, "head_dim": 14}
    compare(config, Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields(config), **experts, **heads)))
