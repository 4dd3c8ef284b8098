"""What the forward pass leaves for the backward pass, a token at a time: the tensors that autograd keeps.

Held to counted tensors (torch.autograd.graph.saved_tensors_hooks) in tests/plan/test_activations.py, on the code that
runs on a GPU. Under torch.compile what is cheap to make again is not kept: aot_autograd's partition of the graph keeps
the results of products, of reductions and what products read.
"""

from dataclasses import dataclass

from ray_ds.config.model import ModelConfig
from ray_ds.plan.case import Case

LOSS_CHUNK = 1 << 28
"""Logits that the loss works on at once in fp32 where all are kept: `model.loss.GPU_CHUNK`."""
LINEAR_LOSS_CHUNK = 1 << 27
"""Logits that are made and used at once where none are kept: `model.loss.LINEAR_GPU_CHUNK`."""
STATISTICS_BYTES = 4
"""A norm's root or a softmax's sum, fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of a micro-batch."""

    kept: int
    """By all layers, until the backward pass reaches them."""
    loss: int
    """By the loss: logits, or where it makes its gradients on the way forth these of the head and what it reads."""
    loss_work: int
    """What the loss takes besides while it works: its chunks in fp32, and the gradients made in them."""
    again: int
    """A layer whose activations are made a second time, and what its backward pass takes."""

    @property
    def peak(self) -> int:
        """The most at a time: where the loss turns round, or in the last layer's backward pass."""
        return self.kept + max(self.loss + self.loss_work, self.again)


def activations_of(case: Case) -> Activations:
    """Return what a micro-batch takes."""
    config, tokens = case.part, case.micro_tokens
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
    top = config.hidden_size * case.dtype_bytes + STATISTICS_BYTES + 8  # the last norm's input, and token ids
    if case.precision == "fp16":
        top += config.hidden_size * case.dtype_bytes + 8  # what the head reads, and targets
    # A module of multi-token prediction also joins two normed vectors.
    top += config.num_nextn_predict_layers * (top + 6 * config.hidden_size * case.dtype_bytes)
    loss, loss_work = _loss_bytes(case)
    return Activations(kept=int(tokens * (layers + top)), loss=loss, loss_work=loss_work, again=int(tokens * again))


def _loss_bytes(case: Case) -> tuple[int, int]:
    """Return what the loss keeps and what it takes while it works."""
    config, tokens = case.config, case.micro_tokens
    heads = 1 + config.num_nextn_predict_layers
    size, head = config.vocab_size * tokens, config.vocab_size * config.hidden_size
    if case.precision == "fp16":  # the gradient is small until the loss was scaled, so it is made on the way back
        chunks = 4 * min(size, LOSS_CHUNK) * (1 if case.compile else 2)
        return heads * (case.dtype_bytes * size + 4 * tokens), case.dtype_bytes * size + chunks
    kept = case.dtype_bytes * (heads * (config.hidden_size * tokens + head))
    chunks = (4 + 2 * case.dtype_bytes) * min(size, LINEAR_LOSS_CHUNK)
    return kept, chunks + 4 * head + case.dtype_bytes * head


def layer_bytes(case: Case, *, is_sparse: bool) -> int:
    """Return what one layer keeps of a token."""
    config = case.part
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
        normed = (heads + config.num_key_value_heads) * config.head_dim if config.qk_norm else 0
        return 4 * heads * config.head_dim + normed  # keys and values are copied to each query's head
    width = max(config.qk_head_dim, config.v_head_dim)  # values are padded to the width of keys
    latents = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) + 2 * (config.q_lora_rank or 0)
    padded_copy = heads * config.v_head_dim if width > config.v_head_dim else 0
    return 4 * heads * width + padded_copy + latents
