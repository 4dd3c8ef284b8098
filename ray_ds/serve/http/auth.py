"""API keys: only their hash is kept, and comparing takes the same time for every wrong key."""

import hashlib
import hmac

from ray_ds.serve.http.errors import ApiError


def hash_api_key(key: str) -> str:
    """Return what is kept of a key. Keys are random and long, so a plain sha256 cannot be searched."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_api_key(authorization: str | None, expected_hash: str | None) -> None:
    """Refuse a request whose `Authorization` header has no valid key.

    Args:
        expected_hash: from `hash_api_key`; None = no key is needed.
    Raises:
        ApiError: 401.
    """
    if expected_hash is None:
        return
    scheme, _, key = (authorization or "").partition(" ")
    found = hash_api_key(key.strip()) if scheme.lower() == "bearer" else ""
    if not hmac.compare_digest(found, expected_hash):
        message = "missing or wrong API key; send it as 'Authorization: Bearer KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=headers)
