"""Folders as transformers writes them: small models with random weights, and tokenizers cut as the published ones."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ray_ds.model.hugging_face import from_hf_config
from ray_ds.model.hugging_face.shapes import copies_on_disk, shapes_on_disk

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB_SIZE = 384
TEXTS = [
    "In the beginning God created the heaven and the earth; it's 1999, 2,024 and 3.14159!\n\n\tdef main(): pass\r\n",
    "太初有道，道與神同在。今天是2024年3月15日，气温零下5℃；“你好，world”！ 👩‍👩‍👧‍👦 ❤️ é",
    "We'll see what THEY'LL say...   \n \n x  y\x00\u200b \t",
]

# Where Llama 3 and Qwen2 cut text: their tokenizer.json; both follow tiktoken's cl100k_base.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# The three steps of DeepSeek-V3's tokenizer.json.
DEEPSEEK_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
MARKS: Mapping[str, Mapping[str, Any]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "deepseek": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
}
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def make_tokenizer(style: str) -> Tokenizer:
    """Return a tokenizer that cuts, normalises and marks texts as the published ones of a style do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    patterns = {"llama3": [LLAMA3_PATTERN], "qwen": [QWEN_PATTERN], "deepseek": DEEPSEEK_PATTERNS}[style]
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    first = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"] if style == "deepseek" else []
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if style == "llama3":
        tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    elif style == "qwen":
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    else:
        tokenizer.add_tokens(["<think>"])
    bos = MARKS[style]["bos_token"]
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def save_tokenizer(folder: Path, style: str, **changes: Any) -> None:
    """Write a tokenizer as transformers does."""
    from transformers import PreTrainedTokenizerFast

    marks = {name: value for name, value in {**MARKS[style], **changes}.items() if value is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(style), **marks)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


GROUPED = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
LATENT = {
    **GROUPED,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "n_group": 1,
    "topk_group": 1,
}
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama, stretched, tied": (
        "Llama",
        {
            **GROUPED,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama, linear": (
        "Llama",
        {
            **GROUPED,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen2": (
        "Qwen2",
        {**GROUPED, "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1, "max_window_layers": 2},
    ),
    "qwen2, tied": (
        "Qwen2",
        {**GROUPED, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3",
        {**GROUPED, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5},
    ),
    "qwen3, yarn, tied": (
        "Qwen3",
        {
            **GROUPED,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {key: value for key, value in YARN.items() if "mscale" not in key},
            "max_position_embeddings": 256,
        },
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    ),
    "deepseek_v2, groups, yarn": (
        "DeepseekV2",
        {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "rope_parameters": YARN},
    ),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "num_nextn_predict_layers": 0}),
    "deepseek_v3, groups, yarn": (
        "DeepseekV3",
        {**LATENT, **GROUPS, "rope_parameters": YARN, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v3, predicts further": ("DeepseekV3", {**LATENT, **GROUPS, "num_nextn_predict_layers": 2}),
}


def style_of(case: str) -> str:
    """Return the kind of tokenizer that comes with a case's family."""
    return {"Llama": "llama3", "Qwen2": "qwen", "Qwen3": "qwen"}.get(CASES[case][0], "deepseek")


def make_folder(folder: Path, case: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "60KB") -> Path:
    """Write a model with large random weights as transformers does, with a tokenizer, and return the folder."""
    import transformers

    family, fields = CASES[case]
    torch.manual_seed(1)
    save_tokenizer(folder, style_of(case))
    ids = {"bos_token_id": 358, "eos_token_id": [359, 358]} if style_of(case) == "qwen" else {}
    config = getattr(transformers, f"{family}Config")(**{"bos_token_id": 0, "eos_token_id": 1, **ids, **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.add_(torch.randn(tensor.shape) * 0.2)
        else:
            tensor.mul_(0.2 if name.endswith("eh_proj.weight") else 4)
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if fields.get("num_nextn_predict_layers"):
        add_prediction(folder, dtype)
    return folder


def add_prediction(folder: Path, dtype: torch.dtype) -> None:
    """Add the modules of multi-token prediction, which transformers does not have, in a file of their own."""
    import json

    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    present = read_tensors(folder)
    config = from_hf_config(json.loads((folder / "config.json").read_text()))
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_on_disk(config).items():
        if name not in present:
            original = copies_on_disk(config).get(name)
            tensors[name] = present[original].clone() if original else (torch.randn(shape) * 0.1).to(dtype)
    save_file(tensors, folder / "prediction.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, "prediction.safetensors")
    index_path.write_text(json.dumps(index))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, read by the safetensors package."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def change_config(folder: Path, **values: Any) -> None:
    """Change fields of config.json; None removes one."""
    import json

    config = json.loads((folder / "config.json").read_text()) | values
    given = {name: value for name, value in config.items() if value is not None or name not in values}
    (folder / "config.json").write_text(json.dumps(given))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder, which are put into one file."""
    tensors = read_tensors(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
