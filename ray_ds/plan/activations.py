"""What the forward pass leaves for the backward pass, a token at a time: the tensors that autograd keeps.

Held to counted tensors (torch.autograd.graph.saved_tensors_hooks) in tests/plan/test_activations.py, on the code that
runs on a GPU. Under torch.compile what is cheap to make again is not kept: aot_autograd's partition of the graph keeps
the results of products, of reductions and what products read.
"""

from dataclasses import dataclass

from ray_ds.config.model import ModelConfig
from ray_ds.plan.case import Case

LOSS_CHUNK = 1 << 28
"""Logits that the loss works on at once in fp32: `model.loss.GPU_CHUNK`."""
STATISTICS_BYTES = 4
"""A norm's root or a softmax's sum, fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of a micro-batch."""

    kept: int
    """By all layers, until the backward pass reaches them."""
    logits: int
    """With the loss's own."""
    loss_gradient: int
    """Of the logits, and the fp32 chunks that it is made in."""
    again: int
    """A layer whose activations are made a second time, and what its backward pass takes."""

    @property
    def peak(self) -> int:
        """The most at a time: where the loss turns round, or in the last layer's backward pass."""
        return self.kept + max(self.logits + self.loss_gradient, self.again)


def activations_of(case: Case) -> Activations:
    """Return what a micro-batch takes."""
    config, tokens = case.config, case.micro_tokens
    sparse = config.num_moe_layers
    dense = config.num_hidden_layers + config.num_nextn_predict_layers - sparse
    layers = dense * layer_bytes(case, is_sparse=False) + sparse * layer_bytes(case, is_sparse=True)
    again = 0.0
    if case.recompute:
        # The pass that is made again leaves what it would have left, and gradients about as large as half of that.
        again = 1.5 * max(
            layer_bytes(case, is_sparse=False) * bool(dense), layer_bytes(case, is_sparse=True) * bool(sparse)
        )
        layers = (dense + sparse) * config.hidden_size * case.dtype_bytes
    top = 2 * config.hidden_size * case.dtype_bytes + STATISTICS_BYTES + 16  # the last norm; token ids and targets
    top *= 1 + config.num_nextn_predict_layers
    size = config.vocab_size * tokens
    chunks = 4 * min(size, LOSS_CHUNK) * (1 if case.compile else 2)
    heads = 1 + config.num_nextn_predict_layers
    return Activations(
        kept=int(tokens * (layers + top)),
        logits=heads * case.dtype_bytes * size + 4 * tokens,
        loss_gradient=case.dtype_bytes * size + chunks,
        again=int(tokens * again),
    )


def layer_bytes(case: Case, *, is_sparse: bool) -> int:
    """Return what one layer keeps of a token."""
    config = case.config
    numbers = 4 * config.hidden_size  # both norms' inputs and results
    numbers += _attention_numbers(config)
    statistics = (3 + config.num_attention_heads) * STATISTICS_BYTES
    if not is_sparse:
        numbers += _mlp_numbers(config.intermediate_size, case)
        return numbers * case.dtype_bytes + statistics
    experts, width = config.num_experts_per_tok, config.hidden_size
    numbers += 2 * experts * width  # each expert's copy of the token, and what it made of it
    numbers += experts * _mlp_numbers(config.moe_intermediate_size, case)
    numbers += _mlp_numbers(config.n_shared_experts * config.moe_intermediate_size, case)
    # The router computes in fp32; orders and numbers of the chosen are int64.
    routing = 4 * (width + 2 * config.n_routed_experts + 3 * experts) + 8 * 4 * experts
    return numbers * case.dtype_bytes + statistics + routing


def _mlp_numbers(inner: int, case: Case) -> int:
    """Return what a gated MLP keeps: gate, up and their product, and eagerly the gate behind its nonlinearity."""
    return (3 if case.compile else 4) * inner


def _attention_numbers(config: ModelConfig) -> int:
    """Return what attention keeps: queries, keys, values and result as the kernel takes them, and latents."""
    heads = config.num_attention_heads
    if config.attention == "gqa":
        return (2 * heads + 2 * config.num_key_value_heads) * config.head_dim
    width = max(config.qk_head_dim, config.v_head_dim)  # values are padded to the width of keys
    latents = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) + 2 * (config.q_lora_rank or 0)
    padded_copy = heads * config.v_head_dim if width > config.v_head_dim else 0
    return 4 * heads * width + padded_copy + latents
