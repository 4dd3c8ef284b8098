import torch

from ray_ds.config.presets import PRESETS
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights


def initial_state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    decoder = Decoder(PRESETS["tiny"]).to(dtype)
    init_weights(decoder, seed)
    return decoder.state_dict()


def test_a_seed_gives_the_same_values_each_time():
    first = initial_state(1)
    torch.rand(3)
    second, other = initial_state(1), initial_state(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_bf16_starts_from_the_rounded_fp32_values():
    wide, narrow = initial_state(1), initial_state(1, torch.bfloat16)
    assert all(torch.equal(wide[name].to(narrow[name].dtype), narrow[name]) for name in wide)


def test_sizes_are_those_of_the_docstring():
    state = initial_state(1)
    assert 0.019 < state["model.embed_tokens.weight"].std() < 0.021
    assert 0.009 < state["model.layers.0.self_attn.o_proj.weight"].std() < 0.011  # 0.02 / sqrt(2 * 2 layers)
    assert 0.009 < state["model.layers.1.mlp.experts.down_proj"].std() < 0.011
    assert state["model.norm.weight"].eq(1).all()
    assert not state["model.layers.1.mlp.gate.e_score_correction_bias"].any()
