"""A tiny decoder with a tokenizer, and task files, for tests of tasks."""

import json
from pathlib import Path
from typing import Any

import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.settings import decode_settings
from ray_ds.config.tasks import TaskSettings
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.tokenizer import BpeTokenizer, train_bpe

MAX_LEN = 256
TEXT = "Question: what is the colour of the sky? Answer: blue. yes no maybe true false one two three four " * 3


def tiny_tokenizer() -> BpeTokenizer:
    return train_bpe([TEXT], 400)


def tiny_config(vocab_size: int) -> ModelConfig:
    return ModelSettings(preset="tiny").resolve(vocab_size, MAX_LEN)


def tiny_decoder(tokenizer: BpeTokenizer, seed: int = 0) -> Decoder:
    """Return a decoder in fp32 whose weights are large enough for opinions that differ from prompt to prompt."""
    torch.set_num_threads(1)
    decoder = Decoder(tiny_config(tokenizer.vocab_size))
    init_weights(decoder, seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return decoder.eval()


def write_jsonl(path: Path, *items: object) -> str:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return str(path)


def task(files: str = "/sets/a.jsonl", **settings: Any) -> TaskSettings:
    """Return a task as a recipe's table is decoded."""
    raw = {"name": "t", "files": files, "prompt": "Question: {question}\nAnswer:", **settings}
    return decode_settings(TaskSettings, raw, where="tasks.0")


CHOOSE = {"choices": "options", "answer": "right", "length_normalisation": "none"}
CLASSIFY = {"labels": ["yes", "no", "maybe"], "answer": "label", "length_normalisation": "none"}
GENERATE = {"metrics": ["exact_match"], "max_new_tokens": 8, "answer": "{answer}"}
