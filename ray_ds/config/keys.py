"""What a line of a file of API keys says."""

from typing import Annotated

from pydantic import Field

from ray_ds.config.settings import settings


@settings
class ApiKey:
    """A key's hash, and how much whoever sends the key may ask for; absent = no limit."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key's UTF-8 bytes, in hexadecimal; the key itself is kept nowhere."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests a minute, all replicas together; after a pause as many at once."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompts and answers a minute, all replicas together. A request is charged `max_tokens` when it starts,
    and given back what it did not write when it ends."""
    max_parallel_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests that are answered at the same time, all replicas together."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Largest `max_tokens` of one answer."""

    @property
    def is_limited(self) -> bool:
        """Whether requests must be counted."""
        return (self.requests_per_minute, self.tokens_per_minute, self.max_parallel_requests) != (None, None, None)
