"""The harness's own adapter to transformers, with the weights of the tiny model."""

from pathlib import Path
from typing import Any

import torch

from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from tests.evaluate.tiny_tasks import MAX_LEN, tiny_config, tiny_decoder, tiny_tokenizer


def harness_model(folder: Path, *, starts_with_bos: bool = False) -> Any:
    """Return lm_eval's `HFLM`.

    Args:
        starts_with_bos: whether the tokenizer puts BOS in front of a text, and the adapter too.
    """
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = tiny_tokenizer()
    state, config = tiny_decoder(tokenizer).state_dict(), tiny_config(tokenizer.vocab_size)
    save_checkpoint_folder(state, config, folder, dtype=torch.float32, max_shard_bytes=1 << 30, bos_token_id=0)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    if starts_with_bos:
        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"add_bos_token": True} if starts_with_bos else {}
    return HFLM(pretrained=model, tokenizer=fast, batch_size=1, max_length=MAX_LEN, device="cpu", **options)
