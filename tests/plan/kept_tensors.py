"""The tensors that autograd keeps of small models, counted on the code that runs on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.config.model import ModelConfig
from ray_ds.model import layers
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.plan.case import Case

ROWS, SEQ_LEN = 2, 256
BASE: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": SEQ_LEN,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 416,
}
GROUPED: dict[str, Any] = {
    "attention": "gqa",
    "vocab_size": 512,
    "max_position_embeddings": SEQ_LEN,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 416,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, Callable[[int], ModelConfig]] = {
    "dense": lambda depth: ModelConfig(**BASE, num_hidden_layers=depth, first_k_dense_replace=depth),
    "query rank": lambda depth: ModelConfig(
        **BASE, num_hidden_layers=depth, first_k_dense_replace=depth, q_lora_rank=64
    ),
    "narrow values": lambda depth: ModelConfig(
        **{**BASE, "v_head_dim": 32}, num_hidden_layers=depth, first_k_dense_replace=depth
    ),
    "grouped queries": lambda depth: ModelConfig(
        **GROUPED, num_hidden_layers=depth, first_k_dense_replace=depth, qk_norm=True
    ),
    "experts": lambda depth: ModelConfig(**BASE, **EXPERTS, num_hidden_layers=depth),
}


class FusedNorm(torch.autograd.Function):
    """What the GPU's kernel keeps, `aten::_fused_rms_norm`: input, weight and the root of each row, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        root = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, root)
        return (x.float() * root).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("only the forward pass is looked at")


def use_gpu_norm(patch: pytest.MonkeyPatch) -> None:
    """Make the norm keep what the GPU's kernel does where nothing is compiled; the rest is `kernels = "fast"`."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)  # type: ignore[arg-type]
        return FusedNorm.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]

    patch.setattr(layers.RMSNorm, "forward", norm)


def case_for(config: ModelConfig, **changes: Any) -> Case:
    made = {
        "config": config,
        "seq_len": SEQ_LEN,
        "batch_tokens": ROWS * SEQ_LEN,
        "micro_batch": ROWS,
        "world_size": 1,
        "zero_stage": 1,
        "precision": "bf16",
        "recompute": False,
        "compile": False,
    }
    return Case(**{**made, **changes})


def kept_bytes(case: Case, divide: Callable[[Decoder], Any] = lambda decoder: None) -> int:
    """Return the bytes of the storages that autograd keeps of a micro-batch, parameters excepted.

    Args:
        divide: reduces the decoder to a process's part of it.
    """
    torch.set_num_threads(1)
    decoder = Decoder(case.config, recompute_activations=case.recompute, kernels="fast")
    init_weights(decoder, 0)
    divide(decoder)
    decoder = decoder.to(torch.bfloat16).train()
    own = {tensor.untyped_storage()._cdata for tensor in [*decoder.parameters(), *decoder.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    run = torch.compile(decoder, backend="aot_eager_decomp_partition") if case.compile else decoder
    assert case.compile == (run is not decoder), "torch.compile does nothing where TORCHDYNAMO_DISABLE=1"
    tokens = torch.randint(case.config.vocab_size, (case.micro_batch, case.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(tokens, tokens)
    torch.compiler.reset()
    return sum(storage.nbytes() for storage in kept.values())
