"""From a dense bf16 folder to a GGUF file in Q8_0, without a tokenizer; needs numpy and the `gguf` package.

Names, metadata and the order of rows in query and key are those of llama.cpp's `llama` architecture: it turns
neighbouring numbers by position, transformers' Llama those half a head apart.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, target: Path) -> None:
    """Write a folder of the Llama family with one file of weights; matrices in Q8_0, norms in fp32.

    Raises:
        ValueError: it is of another family.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"model_type ({config['model_type']}) must be llama; use a dense model")
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (weights,) = folder.glob("*.safetensors")
    for name, values in read_bfloat16(weights):
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(in_gguf_order(name, values, config), kind)
        writer.add_tensor(f"{gguf_name(name)}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a weight of transformers, both without `.weight` at the end."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return OUTER[module]
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[part]}"


def in_gguf_order(name: str, values: Matrix, config: Mapping[str, Any]) -> Matrix:
    """Return a weight with its rows as llama.cpp wants them: each head's halves interleaved in query and key."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(config[heads], 2, config["head_dim"] // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def read_bfloat16(path: Path) -> Iterator[tuple[str, Matrix]]:
    """Yield the names and values of a safetensors file in bf16, which numpy has no type for."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} ({entry['dtype']}) must be BF16; save the model in bf16")
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            bits = np.frombuffer(file.read(end - start), dtype="<u2").astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])
