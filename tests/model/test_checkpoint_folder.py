import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ds.config.presets import PRESETS
from ray_ds.errors import ArtifactError
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights

TINY = PRESETS["tiny"]
ONE_FILE = 1 << 30


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(TINY)
    init_weights(decoder, seed=0)
    for name, buffer in decoder.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    return decoder


def save(decoder, folder, *, dtype=torch.float32, max_shard_bytes=ONE_FILE):
    names = save_checkpoint_folder(
        decoder.state_dict(), decoder.config, folder, dtype=dtype, max_shard_bytes=max_shard_bytes, eos_token_id=3
    )
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    return names


@pytest.mark.parametrize("max_shard_bytes", [ONE_FILE, 50_000])
def test_a_folder_gives_back_the_decoder_bitwise(decoder, tmp_path, max_shard_bytes):
    save(decoder, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint_folder(tmp_path, dtype=torch.float32, device="cpu")
    assert loaded.config == decoder.config
    assert not loaded.training
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_tied_table_is_stored_once_and_tied_again(tmp_path):
    tied = Decoder(dataclasses.replace(TINY, tie_word_embeddings=True))
    init_weights(tied, seed=0)
    save(tied, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_checkpoint_folder(tmp_path, dtype=torch.float32, device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def test_router_biases_stay_fp32_on_disk_and_in_memory(decoder, tmp_path):
    save(decoder, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "bias" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if "bias" not in name} == {torch.bfloat16}
    loaded = load_checkpoint_folder(tmp_path, dtype=torch.bfloat16, device="cpu")
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, decoder.model.layers[1].mlp.gate.e_score_correction_bias)
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_equal_states_give_equal_bytes(decoder, tmp_path):
    for name in ("a", "b"):
        save(decoder, tmp_path / name, max_shard_bytes=50_000)
    assert all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "a").iterdir())


def test_files_stay_below_the_limit_and_the_index_finds_every_tensor(decoder, tmp_path):
    save(decoder, tmp_path, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        stored = load_file(tmp_path / name)
        assert all(index["weight_map"][key] == name for key in stored)
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= 50_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in decoder.state_dict().values())


def test_config_and_generation_config_name_type_and_end_token(decoder, tmp_path):
    save(decoder, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 3)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json \(missing\) must be there; copy or make"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), r"config.json \(.+\) must be JSON"),
    "other config": (lambda f: change_config(f, qk_rope_head_dim=7), r"qk_rope_head_dim \(7\) must be even; use"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors \(missing\) must be there"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model.safetensors \(\d+ bytes\) must be a whole safetensors file",
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop("model.norm.weight")),
        r"model.norm.weight \(missing\) must have the shape \(64,\) of config.json",
    ),
    "surplus tensor": (
        lambda f: change_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        r"extra \(\(1,\)\) must not be there",
    ),
    "wrong shape": (
        lambda f: change_config(f, vocab_size=511),
        r"embed_tokens.weight \(\(512, 64\)\) must have the shape \(511, 64\) of config.json",
    ),
    "too few experts": (
        lambda f: change_config(f, n_routed_experts=8),
        r"\(missing\) must have|must have the shape",
    ),
}


@pytest.mark.shows("A damaged model folder is refused, and the error names the tensor or file")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, decoder, tmp_path):
    save(decoder, tmp_path)
    do, message = DAMAGES[damage]
    do(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint_folder(tmp_path, dtype=torch.float32, device="cpu")
