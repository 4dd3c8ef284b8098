import pytest

from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ConfigError
from ray_ds.serve.build import build_engine
from tests.model.models import KINDS, new_decoder


def build(tokenizer, **settings):
    return build_engine(new_decoder(KINDS["latent"]), tokenizer, ServeSettings(**settings))


def test_by_default_every_running_request_may_be_as_long_as_the_model_allows(tokenizer) -> None:
    engine = build(tokenizer, max_running_requests=3, max_queued_requests=5)
    assert (engine.max_model_len, engine.max_open) == (128, 8)
    assert engine.stats.num_cache_tokens == 3 * 128


def test_a_smaller_cache_is_made_of_whole_blocks(tokenizer) -> None:
    engine = build(tokenizer, max_model_len=100, cache_tokens=150, cache_block_tokens=16)
    assert engine.stats.num_cache_tokens == 144
    assert engine.max_model_len == 100


def test_a_cache_too_small_for_the_models_longest_request_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"cache_tokens \(120\) must be at least 128, one request of 128.*raise"):
        build(tokenizer, cache_tokens=120)
