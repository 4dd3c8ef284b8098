import pytest

from ray_ds.config.quantize import QuantizeSettings
from ray_ds.config.settings import decode_settings, digest_settings
from ray_ds.errors import ConfigError


def test_the_gates_are_those_of_a_model_that_is_as_good() -> None:
    settings = decode_settings(QuantizeSettings, {}, where="quantize")
    assert (settings.max_perplexity_ratio, settings.max_kl, settings.min_top1_agreement) == (1.005, 0.01, 0.98)


@pytest.mark.parametrize(
    "field",
    [
        "max_perplexity_ratio",
        "max_kl",
        "gate_tokens",
        "calibration_tokens",
        "seq_len",
        "max_shard_bytes",
        "micro_batch",
    ],
)
def test_settings_that_measure_nothing_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"demo.toml: quantize.{field} \(0\) must be greater than 0"):
        decode_settings(QuantizeSettings, {field: 0}, where="demo.toml: quantize")


def test_smoothing_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"quantize.smoothing \(0.5\) has no effect where scheme is w8a16: only activ"
    ):
        decode_settings(QuantizeSettings, {"scheme": "w8a16", "smoothing": 0.5}, where="quantize")


def test_workers_that_would_have_nothing_to_do_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize.num_workers \(4\) has no effect without smoothing: one task comp"):
        decode_settings(QuantizeSettings, {"num_workers": 4}, where="quantize")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize.device \(tpu\) must be 'auto', 'cpu' or 'cuda'"):
        decode_settings(QuantizeSettings, {"device": "tpu"}, where="quantize")


def test_only_what_changes_the_output_is_in_the_digest() -> None:
    digested = digest_settings(QuantizeSettings(device="cpu", threads=7, micro_batch=3))
    assert digested == {
        "scheme": "w8a8",
        "smoothing": 0.0,
        "calibration_tokens": 32_768,
        "max_perplexity_ratio": 1.005,
        "max_kl": 0.01,
        "min_top1_agreement": 0.98,
        "gate_tokens": 65_536,
        "seq_len": 2048,
        "max_shard_bytes": 2_000_000_000,
    }
