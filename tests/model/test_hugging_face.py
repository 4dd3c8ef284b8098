import dataclasses
import json
import os

import pytest
import torch

from ray_ds.config.model import EXPERT_FIELDS, GQA_FIELDS, ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.hugging_face import from_hf_config, from_hf_state_dict, to_hf_config, to_hf_state_dict
from ray_ds.model.initial import init_weights

os.environ["HF_HUB_OFFLINE"] = "1"

GROUPED = dataclasses.replace(
    PRESETS["tiny"],
    num_hidden_layers=3,
    n_routed_experts=16,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    routed_scaling_factor=2.5,
)
EXPERT_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in EXPERT_FIELDS}
DENSE = dataclasses.replace(PRESETS["tiny"], **{**EXPERT_DEFAULTS, "n_routed_experts": 0, "first_k_dense_replace": 2})
CASES = {
    "moe": GROUPED,
    "moe, compressed query": dataclasses.replace(GROUPED, q_lora_rank=24),
    "dense": DENSE,
    "dense, compressed query": dataclasses.replace(DENSE, q_lora_rank=24),
    "moe, one group, sums not normed": dataclasses.replace(PRESETS["tiny"], norm_topk_prob=False),
    "moe, tied, other rotary base": dataclasses.replace(GROUPED, tie_word_embeddings=True, rope_theta=500.0),
}


def random_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder with large random weights and router biases that change choices."""
    decoder = Decoder(config)
    init_weights(decoder, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in decoder.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2, generator=generator)
        elif tensor.dim() == 1:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
        else:
            tensor.mul_(4)
    return decoder.eval()


@pytest.mark.shows("A checkpoint gives the same logits in transformers' `DeepseekV3ForCausalLM`, to 1e-5")
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_logits_from_our_folder(name, tmp_path):
    from transformers import DeepseekV3ForCausalLM

    config = CASES[name]
    decoder = random_decoder(config)
    save_checkpoint_folder(decoder.state_dict(), config, tmp_path, dtype=torch.float32, max_shard_bytes=100_000)
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, wanted = decoder(tokens), theirs.eval()(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_transformers_computes_the_same_gradients(tmp_path):
    from transformers import DeepseekV3ForCausalLM

    config = CASES["moe, compressed query"]
    decoder = random_decoder(config).train()
    save_checkpoint_folder(decoder.state_dict(), config, tmp_path, dtype=torch.float32, max_shard_bytes=1 << 30)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(3))
    (decoder(tokens[:, :-1], tokens[:, 1:]) / 64).backward()
    theirs(tokens, labels=tokens).loss.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_names_on_disk_are_those_of_transformers(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = CASES["moe, compressed query"]
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config)))
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    wanted = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = {name: tensor.shape for name, tensor in to_hf_state_dict(Decoder(config).state_dict(), config).items()}
    assert ours == wanted


@pytest.mark.parametrize("name", CASES)
def test_state_survives_the_names_of_the_disk_bitwise(name):
    state = random_decoder(CASES[name]).state_dict()
    back = from_hf_state_dict(to_hf_state_dict(state, CASES[name]), CASES[name])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CASES)
def test_config_survives_json(name):
    config = CASES[name]
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


def test_transformers_reads_every_field(tmp_path):
    from transformers import DeepseekV3Config

    config = CASES["moe, tied, other rotary base"]
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config, eos_token_id=7)))
    theirs = DeepseekV3Config.from_pretrained(tmp_path)
    for field in dataclasses.fields(config):
        if field.name in ("attention", "rope_scaling", "scoring_func", "topk_method", *GQA_FIELDS):
            continue  # not of this family's configuration in transformers
        found = theirs.rope_parameters["rope_theta"] if field.name == "rope_theta" else getattr(theirs, field.name)
        assert found == getattr(config, field.name), field.name
    assert (theirs.bos_token_id, theirs.eos_token_id) == (None, 7)
    assert from_hf_config(theirs.to_dict()) == config


def test_vllm_finds_what_it_asks_for():
    values = to_hf_config(GROUPED)
    wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "model_type": "deepseek_v3", "rope_theta": 10000.0}
    assert wanted.items() <= values.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mistral"},
            r"model_type \(mistral\) must be one of deepseek_v2, deepseek_v3, llama, qwen2, qwen3; use",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 40}},
            r"rope_type \(longrope\) must be one of default",
        ),
        ({"attention_bias": True}, r"attention_bias \(True\) must be False"),
        ({"hidden_size": None}, r"hidden_size \(missing\) must be given"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    values = {**to_hf_config(GROUPED), **change}
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ArtifactError, match=message):
        from_hf_config(values)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", None, r"experts.2.up_proj.weight \(missing\) must be in"),
        (
            "model.layers.1.mlp.experts.3.down_proj.weight",
            (64, 31),
            r"down_proj.weight \(\(64, 31\)\) must have the shape",
        ),
    ],
)
def test_an_incomplete_set_of_experts_is_refused(name, shape, message):
    tensors = to_hf_state_dict(Decoder(PRESETS["tiny"]).state_dict(), PRESETS["tiny"])
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(ArtifactError, match=message):
        from_hf_state_dict(tensors, PRESETS["tiny"])
