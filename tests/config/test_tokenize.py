"""What the settings of tokenizer, tokenize and evaluate refuse."""

import pytest

from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.settings import decode_settings, digest_settings, field_docs
from ray_ds.config.tokenize import TokenizeSettings
from ray_ds.config.tokenizer import MIN_VOCAB_SIZE, TokenizerSettings
from ray_ds.errors import ConfigError
from ray_ds.tokenizer import SPECIAL_TOKENS


@pytest.mark.parametrize("vocab_size", [0, MIN_VOCAB_SIZE - 1, (1 << 32) + 1])
def test_vocabulary_must_hold_bytes_and_fit_shards(vocab_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_settings(TokenizerSettings, {"vocab_size": vocab_size}, where="demo.toml: tokenizer")
    assert str(caught.value) == (
        f"demo.toml: tokenizer.vocab_size ({vocab_size}) must be from 263 (7 special tokens and 256 bytes) to 2^32; "
        "try 4096 for a small model, 32768 or more else."
    )


def test_smallest_vocabulary_is_special_tokens_and_bytes() -> None:
    assert len(SPECIAL_TOKENS) + 256 == MIN_VOCAB_SIZE
    assert decode_settings(TokenizerSettings, {"vocab_size": 263}, where="x").vocab_size == 263


@pytest.mark.parametrize(
    ("cls", "raw", "message"),
    [
        (TokenizerSettings, {"sample_bytes": 0}, "x.sample_bytes"),
        (TokenizeSettings, {"validation_fraction": 0.0}, "x.validation_fraction"),
        (TokenizeSettings, {"validation_fraction": 1.0}, "x.validation_fraction"),
        (TokenizeSettings, {"hold_out": "book"}, "x.hold_out"),
        (EvaluateSettings, {}, r"x.seq_len \(missing\) must be given"),
        (EvaluateSettings, {"seq_len": 0}, "x.seq_len"),
        (EvaluateSettings, {"seq_len": 8, "precision": "fp16"}, "x.precision"),
        (EvaluateSettings, {"seq_len": 8, "num_workers": 0}, "x.num_workers"),
    ],
)
def test_values_out_of_range_are_refused(cls: type, raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_settings(cls, raw, where="x")


def test_only_what_changes_the_output_is_digested() -> None:
    assert digest_settings(TokenizeSettings(max_running_units=3)) == digest_settings(TokenizeSettings())
    assert set(digest_settings(EvaluateSettings(seq_len=8))) == {
        "seq_len",
        "precision",
        "max_tokens",
        "baseline_tokens",
        "tasks",
        "lm_eval",
    }


@pytest.mark.parametrize("cls", [TokenizerSettings, TokenizeSettings, EvaluateSettings])
def test_every_field_is_documented(cls: type) -> None:
    assert all(field_docs(cls).values())
