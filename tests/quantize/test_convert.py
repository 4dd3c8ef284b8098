import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import read_tensors, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.quantize import dequantize_state, load_quantized, quantize_folder
from ray_ds.quantize.layout import is_quantized
from tests.quantize.tiny_models import Kind, config_of, make_tokens, trained_state, write_checkpoint

ONE_FILE = 1 << 30


@pytest.fixture(scope="module", params=["dense", "moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path, Path]:
    """A checkpoint and its INT8 model."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_checkpoint(folder / "model", request.param)
    quantize_folder(source, folder / "int8", max_shard_bytes=ONE_FILE)
    return request.param, source, folder / "int8"


def test_layers_are_int8_with_a_scale_a_row_and_the_rest_is_not(folders: tuple[Kind, Path, Path]) -> None:
    kind, source, target = folders
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    attention = ["self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]
    mlp = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    if kind == "dense":
        layers = [f"0.{name}" for name in ["self_attn.q_proj", *attention, *mlp]]
        layers += [f"1.{name}" for name in ["self_attn.q_proj", *attention, *mlp]]
    else:
        queries = ["self_attn.q_a_proj", "self_attn.q_b_proj"]
        experts = [f"mlp.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up", "down")]
        shared = [f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")]
        layers = [f"0.{name}" for name in [*queries, *attention, *mlp]]
        layers += [f"1.{name}" for name in [*queries, *attention, *experts, *shared]]
    expected = {f"model.layers.{name}.weight" for name in layers}
    assert {name for name, tensor in after.items() if tensor.dtype == torch.int8} == expected
    assert set(after) == set(before) | {f"{name}_scale" for name in expected}
    for name in expected:
        assert after[name].shape == before[name].shape
        assert after[f"{name}_scale"].dtype == torch.float32
        assert after[f"{name}_scale"].shape == (len(before[name]), 1)
    for name in set(before) - expected:
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], before[name].to(torch.float32 if is_bias else torch.bfloat16))


def test_the_config_says_what_other_engines_want(folders: tuple[Kind, Path, Path]) -> None:
    _, source, target = folders
    before = json.loads((source / "config.json").read_text())
    after = json.loads((target / "config.json").read_text())
    assert after.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    assert (after["topk_method"], after["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert after == {**before, "dtype": "bfloat16"}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", True),
        ("model.layers.3.self_attn.q_b_proj.weight", True),
        ("model.layers.3.self_attn.kv_b_proj.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.mlp.gate.e_score_correction_bias", False),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_which_tensors_become_int8(name: str, expected: bool) -> None:
    assert is_quantized(name) is expected


def test_the_same_checkpoint_gives_the_same_bytes(folders: tuple[Kind, Path, Path], tmp_path: Path) -> None:
    _, source, target = folders
    quantize_folder(source, tmp_path / "again", max_shard_bytes=ONE_FILE)
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    for path in target.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_several_files_hold_the_same_tensors_and_an_index(folders: tuple[Kind, Path, Path], tmp_path: Path) -> None:
    _, source, target = folders
    limit = 6000
    sizes = quantize_folder(source, tmp_path / "cut", max_shard_bytes=limit)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    names = sorted({path.name for path in (tmp_path / "cut").glob("*.safetensors")})
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 3
    assert index["metadata"]["total_size"] == sizes.bytes
    whole = load_file(target / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    for name in names:
        part = load_file(tmp_path / "cut" / name)
        assert all(index["weight_map"][key] == name and torch.equal(part[key], whole[key]) for key in part)
        assert len(part) <= 2 or sum(tensor.nbytes for tensor in part.values()) <= limit


def test_the_sizes_are_those_of_the_tensors(folders: tuple[Kind, Path, Path], tmp_path: Path) -> None:
    _, source, target = folders
    sizes = quantize_folder(source, tmp_path / "again", max_shard_bytes=ONE_FILE)
    assert sizes.bytes == sum(tensor.nbytes for tensor in load_file(target / "model.safetensors").values())
    assert sizes.bf16_bytes == sum(2 * tensor.numel() for tensor in load_file(source / "model.safetensors").values())


def test_a_large_model_takes_little_more_than_half(tmp_path: Path) -> None:
    config = config_of("dense", hidden_size=512, intermediate_size=1536)
    decoder = Decoder(config)
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in decoder.state_dict().items()}
    save_checkpoint_folder(state, config, tmp_path / "model", dtype=torch.bfloat16, max_shard_bytes=ONE_FILE)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    sizes = quantize_folder(tmp_path / "model", tmp_path / "int8", max_shard_bytes=ONE_FILE)
    assert 0.5 < sizes.bytes / sizes.bf16_bytes < 0.52


def test_transformers_agrees_on_what_the_integers_stand_for(folders: tuple[Kind, Path, Path], tmp_path: Path) -> None:
    kind, _, target = folders
    floats = dequantize_state(read_tensors(target))
    assert all(tensor.dtype == torch.float32 for tensor in floats.values())
    save_file(floats, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    other = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    tokens = make_tokens(4, 32, seed=1000)
    with torch.inference_mode():
        expected = other(tokens).logits
        found = load_quantized(target)(tokens)
    # What is left is the rounding of activations; the weights are the same.
    assert (found - expected).norm() / expected.norm() < 0.03
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97
    assert kind in ("dense", "moe")


def test_an_int8_model_is_not_quantized_again(folders: tuple[Kind, Path, Path], tmp_path: Path) -> None:
    _, _, target = folders
    with pytest.raises(ArtifactError, match=r"proj.weight \(torch.int8\) must be of a float type; quantize the check"):
        quantize_folder(target, tmp_path / "twice", max_shard_bytes=ONE_FILE)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained_state("dense").items()}
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    source = write_checkpoint(tmp_path / "model", "dense", state)
    with pytest.raises(ArtifactError, match=r"layers.1.mlp.down_proj.weight \(NaN or infinity\) must have finite"):
        quantize_folder(source, tmp_path / "int8", max_shard_bytes=ONE_FILE)


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "dense")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model.safetensors \(\d+ bytes\) must be a whole safetensors file"):
        quantize_folder(source, tmp_path / "int8", max_shard_bytes=ONE_FILE)
