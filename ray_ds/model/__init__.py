"""Decoders in plain torch: DeepSeek's and Llama's, dense or with experts.

The way through them: `decoder.py` (loss, logits, drafts) > `backbone.py` (layers) > `block.py` (one layer) >
`latent_attention.py` or `grouped_attention.py`, `router.py` and `experts.py`. Below these: `attention.py` (softmax
attention), `rotary.py`, `documents.py` (masks), `caches.py`, `layers.py`, `loss.py`, `prediction.py` (tokens ahead),
`kernels.py` (plain or fast). For serving: `paged_cache.py`, `row_exact.py` and `row_tiles.py` (a row's own bits).
Beside them `initial.py`, `balance.py`, `fp8/`, `hugging_face/` and `checkpoint_folder.py` for first values, router
biases, training in FP8, names and files.

Letters of shapes; a line that changes a shape ends with it:

    B  rows of a batch             D  hidden_size, the model's width
    T  query tokens of a row       R  kv_lora_rank, the latent's width
    S  cached tokens of a row      I  inner width of an MLP
    N  tokens of a batch, B * T    E  routed experts of a layer
    H  attention heads             K  experts a token chooses
    G  heads of keys and values    V  vocabulary
"""

from ray_ds.model.balance import expert_load, max_violation, reset_expert_load, update_router_bias
from ray_ds.model.caches import SlotCache
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.model.loss import IGNORED_TARGET

__all__ = [
    "IGNORED_TARGET",
    "Decoder",
    "SlotCache",
    "expert_load",
    "init_weights",
    "load_checkpoint_folder",
    "max_violation",
    "reset_expert_load",
    "save_checkpoint_folder",
    "update_router_bias",
]
