"""What one H200 did in `jobs.bench.train` and in bare loops of the same shapes, to hold the plan's speed to."""

from dataclasses import dataclass
from typing import Any

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.plan.case import Case

ROWS = 2048
"""Tokens of a row in all of them."""

DENSE_1B = ModelConfig(
    attention="gqa",
    vocab_size=32768,
    max_position_embeddings=ROWS,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    intermediate_size=5632,
    first_k_dense_replace=16,
)
MIXTURE = ModelConfig(
    vocab_size=32768,
    max_position_embeddings=ROWS,
    hidden_size=1024,
    num_hidden_layers=12,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=4096,
    first_k_dense_replace=1,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=512,
    n_group=8,
    topk_group=4,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on one H200 with torch 2.11, rows of 2,048 tokens, and what it reached."""

    name: str
    case: Case
    tokens_per_s: float


def _run(name: str, config: ModelConfig, rows: int, tokens_per_s: float, **changes: Any) -> Run:
    given = {
        "config": config,
        "seq_len": ROWS,
        "batch_tokens": rows * ROWS,
        "micro_batch": min(rows, 16),
        "world_size": 1,
        "zero_stage": 1,
        "precision": "bf16",
        "recompute": False,
        "compile": True,
    }
    return Run(name=name, case=Case(**{**given, **changes}), tokens_per_s=tokens_per_s)


DENSE = PRESETS["dense_350m"]
TRAINED = (
    _run("dense 371 M, ZeRO 1", DENSE, 16, 158_700),
    _run("dense 371 M, ZeRO 1, steps of 0.5 M tokens", DENSE, 256, 197_600),
    _run("dense 371 M, ZeRO 1, eager", DENSE, 16, 117_400, compile=False),
    _run("dense 371 M, ZeRO 2, eager", DENSE, 16, 118_600, compile=False, zero_stage=2),
    _run("dense 371 M, ZeRO 3, eager", DENSE, 16, 79_000, compile=False, zero_stage=3),
    _run("dense 371 M, ZeRO 1, fp16, eager", DENSE, 16, 116_100, compile=False, precision="fp16"),
    _run("dense 371 M, ZeRO 3, fp16, eager", DENSE, 16, 72_600, compile=False, zero_stage=3, precision="fp16"),
)
"""By `jobs.bench.train`; the README's table "Measured" has the commands."""

BARE = (
    _run("dense 1 B, 8 rows", DENSE_1B, 8, 97_700),
    _run("dense 1 B, 16 rows", DENSE_1B, 16, 100_200),
    _run("mixture of 1.26 B, 8 rows", MIXTURE, 8, 196_800),
    _run("mixture of 1.26 B, 16 rows", MIXTURE, 16, 213_100),
    _run("mixture of 1.26 B, 32 rows", MIXTURE, 32, 221_900, micro_batch=32),
    _run("mixture of 1.26 B, 8 rows, eager", MIXTURE, 8, 144_400, compile=False),
)
"""Loops without Ray and DeepSpeed, everything in bf16, torch's fused AdamW."""
