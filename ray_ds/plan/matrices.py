"""The matrices that a token is multiplied with: what a plan knows of a model beyond its counts."""

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ds.config.model import ModelConfig
from ray_ds.plan.case import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Alike matrices of one model."""

    rows: int
    columns: int
    used: float
    """How many of them a token is multiplied with, in the whole model."""
    stored: int
    """How many there are."""

    @property
    def numel(self) -> int:
        """Numbers of one of them."""
        return self.rows * self.columns


def layer_matrices(config: ModelConfig) -> list[Matrix]:
    """Return the matrices of all layers, those of multi-token prediction too; without embeddings and head."""
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    num_sparse = config.num_moe_layers if config.n_routed_experts else 0
    num_dense = num_layers - num_sparse
    width = config.hidden_size
    found = [
        Matrix(rows=rows, columns=columns, used=num_layers, stored=num_layers)
        for rows, columns in _attention_matrices(config)
    ]
    found += _mlp(width, config.intermediate_size, num_dense, num_dense)
    if num_sparse:
        inner = config.moe_intermediate_size
        routed, shared = config.n_routed_experts * num_sparse, config.n_shared_experts * num_sparse
        found += _mlp(width, inner, config.num_experts_per_tok * num_sparse, routed)
        found += _mlp(width, inner, shared, shared)
        found.append(Matrix(rows=config.n_routed_experts, columns=width, used=num_sparse, stored=num_sparse))
    if extra := config.num_nextn_predict_layers:
        found.append(Matrix(rows=width, columns=2 * width, used=extra, stored=extra))
    return [matrix for matrix in found if matrix.numel and matrix.stored]


def num_heads_used(config: ModelConfig) -> int:
    """Return how often a token is multiplied with the head: once, and once for each further token predicted."""
    return 1 + config.num_nextn_predict_layers


def largest_tensor(case: Case) -> int:
    """Return the numbers of a worker's largest parameter: the embedding table, or a layer's stacked experts."""
    config = case.part
    experts = case.num_held_experts * 2 * config.moe_intermediate_size * config.hidden_size
    return max(config.vocab_size * config.hidden_size, experts, config.intermediate_size * config.hidden_size)


def num_tensors(config: ModelConfig) -> int:
    """Return about how many parameters the optimizer has: experts are stacked, two tensors a layer."""
    per_layer = len(list(_attention_matrices(config))) + 2 + 2 + 3  # norms of the layer and its latents, an MLP
    sparse = config.num_moe_layers * 3  # two stacks and the router
    return (config.num_hidden_layers + config.num_nextn_predict_layers) * per_layer + sparse + 3


def _mlp(width: int, inner: int, used: float, stored: int) -> list[Matrix]:
    return [
        Matrix(rows=inner, columns=width, used=2 * used, stored=2 * stored),
        Matrix(rows=width, columns=inner, used=used, stored=stored),
    ]


def _attention_matrices(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yield (rows, columns) of one layer's attention."""
    width, heads = config.hidden_size, config.num_attention_heads
    if config.attention == "gqa":
        yield heads * config.head_dim, width
        yield 2 * config.num_key_value_heads * config.head_dim, width
        yield width, heads * config.head_dim
        return
    query = heads * config.qk_head_dim
    if config.q_lora_rank:
        yield config.q_lora_rank, width
        yield query, config.q_lora_rank
    else:
        yield query, width
    yield config.kv_lora_rank + config.qk_rope_head_dim, width
    yield heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
    yield width, heads * config.v_head_dim
