"""The DeepSeek-V3 decoder, dense or with experts, in plain torch.

The way through it: `decoder.py` (blocks, loss, logits) > `attention.py`, `experts.py` > `caches.py`; then `initial.py`,
`balance.py`, `hugging_face.py` and `checkpoint_folder.py` for first values, router biases, names and files.

Letters of shapes; a line that changes a shape ends with it:

    B  rows of a batch             D  hidden_size, the model's width
    T  query tokens of a row       R  kv_lora_rank, the latent's width
    S  cached tokens of a row      I  inner width of an MLP
    N  tokens of a batch, B * T    E  routed experts of a layer
    H  attention heads             K  experts a token chooses
    V  vocabulary
"""

from ray_ds.model.balance import expert_load, max_violation, reset_expert_load, update_router_bias
from ray_ds.model.caches import LatentCache
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.model.loss import IGNORED_TARGET

__all__ = [
    "IGNORED_TARGET",
    "Decoder",
    "LatentCache",
    "expert_load",
    "init_weights",
    "load_checkpoint_folder",
    "max_violation",
    "reset_expert_load",
    "save_checkpoint_folder",
    "update_router_bias",
]
