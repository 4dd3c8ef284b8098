"""`ray-ds import hf` and `ray-ds export --to hf`, and imports in recipes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ray_ds import cli
from ray_ds.artifacts import Checkpoint
from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.exchange.sources import find_files
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.recipe import load_recipe
from ray_ds.report import trace_lines
from ray_ds.stages.tokenize import check_same_corpus, find_tokenizer
from ray_ds.steps import find_finished, prepare_run
from ray_ds.tokenizer import train_bpe
from tests.exchange.hf_folders import TEXTS, change_config, make_folder, read_tensors
from tests.stages.small_artifacts import make_corpus, stage_run


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return int(stopped.value.code or 0)


@pytest.mark.shows("`ray-ds import hf` takes a model in, `ray-ds export --to hf` gives it back")
def test_import_and_export_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "in", "qwen3", dtype=torch.bfloat16)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert run("import", "hf", "in/", "--output", "runs", "--licence", "MIT") == 0
    uri = capsys.readouterr().out.splitlines()[-1]
    assert uri.startswith(f"{tmp_path}/runs/import_hf/")
    assert any("MIT" in line for line in trace_lines(uri))
    assert run("export", uri, "--to", "hf", "--output", "out", "--dtype", "float32") == 0
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, read_tensors(source)[name].float())
    assert run("export", uri, "--to", "hf", "--output", "out") == 2
    assert f"--output ({tmp_path}/out) must be empty or absent; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "hf", "nowhere", "--output", "runs"), "nowhere: no such folder, or empty) must be a folder of a"),
        (("import", "gguf", "x", "--output", "runs"), "invalid choice: 'gguf'"),
        (("import", "hf", "x"), "the following arguments are required: --output"),
        (("export", "nowhere", "--to", "hf", "--output", "out"), "nowhere (no manifest) must be a finished"),
        (("export", "x", "--to", "hf", "--output", "out", "--dtype", "int4"), "invalid choice: 'int4'"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_only_a_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path, {"a": "text"})
    assert run("export", corpus.uri, "--to", "hf", "--output", str(tmp_path / "out")) == 2
    assert "(Corpus) must be a Checkpoint; name the Checkpoint" in capsys.readouterr().err


RECIPE = """
name = "t"
run_dir = "runs"
[[step]]
name = "base"
stage = "import_hf"
settings.path = "in"
[[step]]
stage = "clean"
settings.inputs = [{ glob = "/text/*.txt", source = "s", licence = "l" }]
[[step]]
stage = "tokenize"
[[step]]
stage = "serve"
"""


def test_an_import_is_a_step_that_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "in", "llama")
    path = tmp_path / "t.toml"
    path.write_text(RECIPE)
    recipe = load_recipe(str(path), root=str(tmp_path))
    base = recipe.step("base")
    assert base.settings.path == f"{tmp_path}/in"
    assert recipe.step("tokenize").inputs[1] is base and recipe.step("serve").inputs == (base,)
    assert find_finished(recipe, base) is None
    from ray_ds.stages.import_hf import import_hf

    artifact = import_hf(base.settings, prepare_run(recipe, base))
    assert find_finished(recipe, base) == artifact
    folder, digest = find_tokenizer(artifact)
    assert folder == artifact.path("model") and digest == artifact.fact("tokenizer_digest")
    check_same_corpus(make_corpus(tmp_path, {"a": "text"}), artifact)
    (tmp_path / "in/config.json").touch()
    assert find_finished(recipe, base) == artifact
    change_config(tmp_path / "in", rope_theta=1.0)
    assert find_finished(recipe, base) is None


def test_only_what_is_read_counts_as_a_source(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", "llama", max_shard_size="1GB")
    for name in ("README.md", "special_ids.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original/consolidated.safetensors").write_text("x")
    assert find_files(str(folder)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def trained(tmp_path: Path, config: ModelConfig) -> Checkpoint:
    """Return a checkpoint as training leaves it."""
    tokenizer = train_bpe(TEXTS * 4, config.vocab_size)
    decoder = Decoder(config)
    init_weights(decoder, seed=0)
    run = stage_run(tmp_path, "Checkpoint")
    save_checkpoint_folder(
        decoder.state_dict(),
        config,
        Path(run.path("model")),
        dtype=torch.bfloat16,
        max_shard_bytes=1 << 30,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    (Path(run.path("model")) / "tokenizer.json").write_text(tokenizer.to_json())
    artifact = run.commit({"tokenizer_digest": "0" * 16}, seconds=0.0)
    assert isinstance(artifact, Checkpoint)
    return artifact


@pytest.mark.shows("A model trained here opens in AutoModelForCausalLM and AutoTokenizer after `ray-ds export`")
def test_our_own_model_opens_in_transformers_and_comes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ray_ds.stages.import_hf import import_alone

    config = dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=1)
    artifact = trained(tmp_path, config)
    out = tmp_path / "out"
    assert run("export", artifact.uri, "--to", "hf", "--output", str(out)) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    tokens = torch.tensor([tokenizer("In the beginning").input_ids])
    assert tokens[0, 0] == tokenizer.bos_token_id == 0
    ours = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-5)
    back = import_alone(str(out), str(tmp_path / "runs"))
    again = load_checkpoint_folder(Path(back.path("model")), dtype=torch.float32, device="cpu")
    assert again.config == config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


V3 = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}


def test_vllm_finds_what_it_asks_for(tmp_path: Path) -> None:
    """Its DeepSeek loader builds routers' biases by these two fields, and its draft model reads layer `num_layers`."""
    artifact = trained(tmp_path, dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=1))
    run("export", artifact.uri, "--to", "hf", "--output", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert V3.items() <= config.items()
    assert {"rope_theta", "num_key_value_heads", "n_group", "topk_group", "routed_scaling_factor"} <= config.keys()
    names = read_tensors(tmp_path / "out").keys()
    parts = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    assert {f"model.layers.2.{part}.weight" for part in parts} <= names
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"} <= files


GQA = {
    "attention": "gqa",
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "first_k_dense_replace": 2,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(**GQA | EXPERTS), "n_routed_experts (4) must be 0 beside grouped-query attention"),
        (ModelConfig(**GQA, qk_norm=True, qkv_bias=True), "qk_norm (True) must be false beside qkv_bias"),
        (ModelConfig(**GQA | {"hidden_size": 33}), "hidden_size (33) must be a multiple of num_attention_heads (2)"),
        (ModelConfig(**GQA, num_nextn_predict_layers=1), "num_nextn_predict_layers (1) must be 0 in a Llama or Qwen"),
        (dataclasses.replace(PRESETS["tiny"], n_shared_experts=0), "n_shared_experts (0) must be 1 or more"),
        (
            dataclasses.replace(PRESETS["tiny"], scoring_func="softmax", topk_method="greedy"),
            "norm_topk_prob (True) must be false where scoring_func is softmax",
        ),
        (
            dataclasses.replace(PRESETS["tiny"], topk_method="greedy"),
            "topk_method (greedy) must be noaux_tc where scoring_func is sigmoid",
        ),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else "",
)
def test_what_no_model_of_transformers_computes_is_kept_but_not_exported(
    config: ModelConfig, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = trained(tmp_path, config)
    loaded = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    assert loaded.config == config
    assert run("export", artifact.uri, "--to", "hf", "--output", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
