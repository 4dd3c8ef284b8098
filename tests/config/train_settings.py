"""A train step's settings with changes, as a recipe gives them."""

from typing import Any

from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings

PLAIN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "seq_len": 2048,
    "batch_tokens": 16384,
    "micro_batch": 4,
    "steps": 1000,
}


def decode(**changes: Any) -> TrainSettings:
    given = {**PLAIN, **changes}
    raw = {name: value for name, value in given.items() if value is not None}
    return decode_settings(TrainSettings, raw, where="demo.toml: pretrain")
