"""What cannot be followed or is damaged is refused, with the field or tensor and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.errors import UserError
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import change_config, change_tensors, make_folder

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    cases = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "v2": "deepseek_v2, groups, yarn"}
    cases |= {"v3": "deepseek_v3", "mtp": "deepseek_v3, predicts further", "tied": "qwen2, tied"}
    return {name: make_folder(root / name, case) for name, case in cases.items()}


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **values)


def rope(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, rope_parameters={"rope_theta": 10000.0, **values})


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, change)


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def rewrite_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return do


def pickled(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # models that compute otherwise
    "another family": (
        "llama",
        fields(model_type="mixtral"),
        r"model_type \(mixtral\) must be one of deepseek_v2, deeps",
    ),
    "no family": ("llama", fields(model_type=None), r"model_type \(None\) must be one of"),
    "a classifier": (
        "llama",
        fields(architectures=["LlamaForSequenceClassification"]),
        r"architectures \(LlamaForSequenceClassification\) must be a causal language model",
    ),
    "sliding window": (
        "qwen2",
        fields(use_sliding_window=True),
        r"use_sliding_window \(True\) must be False; use a fol",
    ),
    "window by layer": (
        "qwen3",
        fields(layer_types=["full_attention", "sliding_attention"]),
        r"layer_types \(\['full_attention', 'sliding_attention'\]\) must be 'full_attention' in every layer",
    ),
    "bias on the output": ("llama", fields(attention_bias=True), r"attention_bias \(True\) must be False"),
    "bias in Qwen3": ("qwen3", fields(attention_bias=True), r"attention_bias \(True\) must be False"),
    "bias in the MLP": ("llama", fields(mlp_bias=True), r"mlp_bias \(True\) must be False"),
    "activation": ("llama", fields(hidden_act="gelu"), r"hidden_act \(gelu\) must be 'silu'"),
    "bias in DeepSeek": ("v3", fields(attention_bias=True), r"attention_bias \(True\) must be False"),
    "layers between": ("v3", fields(moe_layer_freq=2), r"moe_layer_freq \(2\) must be 1"),
    "halves turned": ("v3", fields(rope_interleave=False), r"rope_interleave \(False\) must be True"),
    "fewer keys": ("v3", fields(num_key_value_heads=1), r"num_key_value_heads \(1\) must be 3: every head has its own"),
    "V3 scores": ("v3", fields(scoring_func="softmax"), r"scoring_func \(softmax\) must be 'sigmoid'"),
    "V3 choice": ("v3", fields(topk_method="greedy"), r"topk_method \(greedy\) must be 'noaux_tc'"),
    "V2 scores": ("v2", fields(scoring_func="sigmoid"), r"scoring_func \(sigmoid\) must be 'softmax'"),
    "V2 choice": ("v2", fields(topk_method="noaux_tc"), r"topk_method \(noaux_tc\) must be 'greedy' or 'group_limited"),
    "V2 norm": ("v2", fields(norm_topk_prob=True), r"norm_topk_prob \(True\) must be False: programs do not agree"),
    "V2 prediction": (
        "v2",
        fields(num_nextn_predict_layers=1),
        r"num_nextn_predict_layers \(1\) must be 0 in a DeepSeek-V2 model",
    ),
    # rotary positions
    "another stretch": (
        "llama",
        rope(rope_type="longrope", factor=2.0),
        r"rope_parameters.rope_type \(longrope\) must be",
    ),
    "dynamic": (
        "llama",
        fields(rope_scaling={"type": "dynamic", "factor": 2.0}),
        r"rope_scaling.rope_type \(dynamic\)",
    ),
    "part of a head": ("llama", rope(partial_rotary_factor=0.5), r"partial_rotary_factor \(0.5\) must be 1.0"),
    "half of a head": ("llama", fields(partial_rotary_factor=0.5), r"partial_rotary_factor \(0.5\) must be 1.0"),
    "not rounded": (
        "qwen3",
        rope(rope_type="yarn", factor=2.0, truncate=False),
        r"rope_parameters.truncate \(False\) must be True",
    ),
    "surplus rope field": (
        "llama",
        rope(rope_type="linear", factor=2.0, mscale=1.0),
        r"rope_parameters.mscale \(1.0\) must not be given for rope_type linear",
    ),
    "rope by layer": (
        "llama",
        fields(rope_parameters={"full_attention": {"rope_theta": 10000.0}}),
        r"rope_parameters.full_attention \(.+\) must not be given for rope_type default",
    ),
    "rope field missing": (
        "llama",
        rope(rope_type="llama3", factor=2.0),
        r"rope_parameters.low_freq_factor \(missing\) must be given for rope_type llama3",
    ),
    "rope field of another type": ("llama", rope(rope_type="linear", factor="2"), r"factor \(2\) must be a number"),
    "shrunk": ("llama", rope(rope_type="linear", factor=0.5), r"rope_scaling.factor \(0.5\) must be 1 or more"),
    # config.json itself
    "field missing": ("llama", fields(hidden_size=None), r"hidden_size \(missing\) must be given"),
    "field of another type": ("llama", fields(hidden_size="48"), r"hidden_size \(48\) must be of type int"),
    "odd heads": (
        "llama",
        fields(hidden_size=49, head_dim=None),
        r"head_dim \(missing\) must be given where hidden_size",
    ),
    "no model": ("v3", fields(qk_rope_head_dim=7), r"qk_rope_head_dim \(7\) must be even"),
    "torn config": ("llama", lambda f: (f / "config.json").write_text("{"), r"config.json \(1 bytes\) must be JSON"),
    "list": ("llama", lambda f: (f / "config.json").write_text("[]"), r"config.json \(list\) must be a JSON object"),
    "no config": (
        "llama",
        lambda f: (f / "config.json").unlink(),
        r"path \(.+: no config.json\) must be a folder of a H",
    ),
    "no folder": (
        "llama",
        lambda f: shutil.rmtree(f),
        r"path \(.+: no such folder, or empty\) must be a folder of a Hug",
    ),
    # quantized weights of other kinds
    "another quantization": (
        "llama",
        fields(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config.quant_method \(gptq\) must be 'fp8'; use the folder of the model before it was quantized",
    ),
    "whole tensors": (
        "llama",
        fields(quantization_config={**FP8, "weight_block_size": None}),
        r"quantization_config.weight_block_size \(None\) must be \[128, 128\]",
    ),
    "static activations": (
        "llama",
        fields(quantization_config={**FP8, "activation_scheme": "static"}),
        r"quantization_config.activation_scheme \(static\) must be 'dynamic'",
    ),
    # tensors
    "missing tensor": (
        "llama",
        tensors(lambda t: t.pop("model.norm.weight")),
        r"model.norm.weight \(missing\) must have the shape \(48,\) of config.json",
    ),
    "missing expert": (
        "v3",
        tensors(lambda t: t.pop(f"{LAYER}.mlp.experts.5.up_proj.weight")),
        r"experts.5.up_proj.weight \(missing\) must have the shape \(20, 48\)",
    ),
    "missing bias": (
        "qwen2",
        tensors(lambda t: t.pop(f"{LAYER}.self_attn.k_proj.bias")),
        r"k_proj.bias \(missing\) must have the shape \(12,\)",
    ),
    "surplus tensor": (
        "llama",
        tensors(lambda t: t.update({f"{LAYER}.self_attn.o_proj.bias": torch.zeros(48)})),
        r"o_proj.bias \(\(48,\)\) must not be there: config.json has no place for it; use a folder that was copied w",
    ),
    "shape": (
        "llama",
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(47)})),
        r"model.norm.weight \(\(47,\)\) must have the shape \(48,\) of config.json",
    ),
    "whole numbers": (
        "llama",
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})),
        r"model.norm.weight \(I8\) must be of type F32, BF16, F16, F8_E4M3",
    ),
    "part of the prediction": (
        "mtp",
        tensors(lambda t: t.pop("model.layers.4.eh_proj.weight")),
        r"model.layers.4.eh_proj.weight \(missing\) must have the shape \(48, 96\)",
    ),
    "another head": (
        "mtp",
        tensors(lambda t: t["model.layers.3.shared_head.head.weight"].add_(1)),
        r"model.layers.3.shared_head.head.weight \(other values\) must equal lm_head.weight, which it repeats",
    ),
    "untied": (
        "tied",
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        r"lm_head.weight \(other values\) must equal model.embed_tokens.weight",
    ),
    "no scale": (
        "llama",
        tensors(lambda t: t.update({f"{LAYER}.self_attn.q_proj.weight": torch.zeros(48, 48).to(torch.float8_e4m3fn)})),
        r"q_proj.weight_scale_inv \(missing\) must have the shape \(1, 1\), a scale a block of",
    ),
    "scale of another shape": (
        "llama",
        tensors(
            lambda t: t.update(
                {
                    f"{LAYER}.self_attn.q_proj.weight": torch.zeros(48, 48).to(torch.float8_e4m3fn),
                    f"{LAYER}.self_attn.q_proj.weight_scale_inv": torch.ones(2, 1),
                }
            )
        ),
        r"q_proj.weight_scale_inv \(\(2, 1\)\) must have the shape \(1, 1\)",
    ),
    "scale without use": (
        "llama",
        tensors(lambda t: t.update({f"{LAYER}.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})),
        r"q_proj.weight_scale_inv \(a scale\) must belong to a weight of type F8_E4M3",
    ),
    # files
    "torn file": ("llama", cut, r"\.safetensors \(\d+ bytes\) must be a whole safetensors file \(its header asks for"),
    "no safetensors": (
        "llama",
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"x" * 100),
        r"\(100 bytes\) must be a whole safetensors file",
    ),
    "missing file": (
        "llama",
        lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
        r"model-00001-of-\d+.safetensors \(missing\) must be there; copy or make it again",
    ),
    "pickled": (
        "llama",
        pickled,
        r"model.safetensors \(missing, and no index\) must be there beside pytorch_model.bin; copy the folder whole",
    ),
    "torn index": (
        "llama",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index.json \(KeyError 'weight_map'\) must be an index",
    ),
    "index of another model": (
        "llama",
        rewrite_index(lambda places: places.update(extra="model-00001-of-00002.safetensors")),
        r"index.json: extra \(.+\) must be the file that has it|missing",
    ),
    # tokenizers
    "no tokenizer": (
        "llama",
        lambda f: (f / "tokenizer.json").unlink(),
        r"tokenizer.json \(missing\) must hold the tokenizer; save it anew with transformers: AutoTokenizer",
    ),
    "torn tokenizer": (
        "llama",
        lambda f: (f / "tokenizer.json").write_text("{"),
        r"tokenizer.json \(.+\) must be a tokenizer of the `tokenizers` package",
    ),
    "too many tokens": (
        "llama",
        lambda f: (fields(vocab_size=300)(f), tensors(lambda t: cut_vocabulary(t, 300))(f)),
        r"tokenizer.json \(\d+ tokens\) must have at most vocab_size \(300\) tokens",
    ),
}


def cut_vocabulary(tensors: dict[str, torch.Tensor], size: int) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size].clone()


@pytest.mark.shows("A folder that cannot be followed exactly is refused; the error names field, value and what to do")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, change, message = REFUSED[case]
    folder = tmp_path / "in"
    shutil.copytree(folders[kind], folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        import_alone(str(folder), str(tmp_path / "runs"))
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def test_what_says_nothing_is_no_obstacle(folders: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    """Old folders store rotary frequencies, tied ones sometimes the head; unknown fields are told."""
    folder = tmp_path / "in"
    shutil.copytree(folders["tied"], folder)
    change_config(folder, some_tool_version="1.2", pretraining_tp=1)
    change_tensors(
        folder,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    artifact = import_alone(str(folder), str(tmp_path / "runs"))
    from tests.exchange.hf_folders import read_tensors

    assert read_tensors(Path(artifact.path("model"))).keys() == read_tensors(folders["tied"]).keys()


def test_older_configs_are_read_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """Before transformers 5 the base was a field and the stretch `rope_scaling`, whose kind DeepSeek calls `type`."""
    from ray_ds.model.checkpoint_folder import read_config

    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        shutil.copytree(folders["v2"], folder)
    table = json.loads((old / "config.json").read_text())["rope_parameters"]
    stretch = {"type": table.pop("rope_type"), **table}
    theta = stretch.pop("rope_theta")
    change_config(old, rope_parameters=None, rope_scaling=stretch, rope_theta=theta)
    assert read_config(old) == read_config(new)
    change_config(old, rope_scaling=None, rope_theta=None, rope_parameters=None)
    assert (read_config(old).rope_scaling, read_config(old).rope_theta) == (None, 10000.0)
