"""From the serve stage's settings to an engine."""

from ray_ds.config.serve import ServeSettings
from ray_ds.errors import ConfigError
from ray_ds.model.decoder import Decoder
from ray_ds.serve.core import TokenTable
from ray_ds.serve.engine import Engine
from ray_ds.serve.paged_decoder import PagedDecoder


def build_engine(decoder: Decoder, tokenizer: TokenTable, settings: ServeSettings) -> Engine:
    """Return an engine, not started, with the cache that the settings ask for.

    Raises:
        ConfigError: the cache cannot hold the model's longest request.
    """
    max_len = settings.max_model_len or decoder.config.max_position_embeddings
    block_size = settings.cache_block_tokens
    blocks_per_request = -(-max_len // block_size)
    if settings.cache_tokens is None:
        num_blocks = settings.max_running_requests * blocks_per_request
    else:
        num_blocks = settings.cache_tokens // block_size
    if num_blocks < blocks_per_request:
        allowed = f"must be at least {blocks_per_request * block_size}, one request of {max_len} tokens in whole blocks"
        raise ConfigError("cache_tokens", settings.cache_tokens, allowed, "raise it, or lower max_model_len")
    assert settings.exactness is not None, "filled in by the settings"
    model = PagedDecoder(
        decoder, num_blocks=num_blocks, block_size=block_size, max_len=max_len, exactness=settings.exactness
    )
    return Engine(
        model,
        tokenizer,
        max_running=settings.max_running_requests,
        max_queued=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        step_tokens=settings.step_tokens,
        cuts_anywhere=settings.exactness != "batch",
        reuses_prefixes=settings.reuse_prefixes,
    )
