"""Configs and tensor names as Hugging Face's folders have them; transformers and vLLM read the same.

`config.py` picks a family by `model_type`: `deepseek.py` (DeepSeek-V2 and V3) or `llama.py` (Llama, Qwen2, Qwen3), with
`rope.py` for rotary scaling and `fields.py` for asking a config.json; `names.py` has
the tensors' names and `shapes.py` what a folder must hold.
"""

from ray_ds.model.hugging_face.config import check_expressible, from_hf_config, to_hf_config
from ray_ds.model.hugging_face.names import from_hf_state_dict, to_hf_state_dict

__all__ = [
    "check_expressible",
    "from_hf_config",
    "from_hf_state_dict",
    "to_hf_config",
    "to_hf_state_dict",
]
