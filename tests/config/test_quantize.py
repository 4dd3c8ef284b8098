import pytest

from ray_ds.config.quantize import QuantizeSettings
from ray_ds.config.settings import decode_settings, digest_settings
from ray_ds.errors import ConfigError


def test_the_gate_is_one_percent_by_default() -> None:
    assert decode_settings(QuantizeSettings, {}, where="quantize").max_perplexity_ratio == 1.01


@pytest.mark.parametrize("field", ["max_perplexity_ratio", "gate_tokens", "max_shard_bytes", "micro_batch", "threads"])
def test_settings_that_measure_nothing_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"demo.toml: quantize.{field} \(0\) must be greater than 0"):
        decode_settings(QuantizeSettings, {field: 0}, where="demo.toml: quantize")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize.device \(tpu\) must be 'auto', 'cpu' or 'cuda'"):
        decode_settings(QuantizeSettings, {"device": "tpu"}, where="quantize")


def test_only_what_changes_the_output_is_in_the_digest() -> None:
    digested = digest_settings(QuantizeSettings(device="cpu", threads=7, micro_batch=3))
    assert digested == {"max_perplexity_ratio": 1.01, "gate_tokens": 65_536, "max_shard_bytes": 2_000_000_000}
