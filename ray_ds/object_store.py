"""Object stores through `pyarrow.fs`: connecting with bounded retries, and saying what a failure means.

Where a store is and who asks comes from the environment, in Amazon's names: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL
(`http://127.0.0.1:9000`; without it Amazon itself), AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_MAX_ATTEMPTS. Google's store reads GOOGLE_APPLICATION_CREDENTIALS.
"""

import functools
import os
import re
from datetime import timedelta

from pyarrow import fs

from ray_ds.errors import ConfigError, StorageRefused, StorageUnavailable

MAX_ATTEMPTS = 7
"""Tries of one request, with waits in between that double up to 20 s: 25 s on average, 51 s at most."""
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 20.0
"""A request is given up, and tried again, when not a byte comes for so long."""

REFUSALS = {
    "ACCESS_DENIED": "give the key of AWS_ACCESS_KEY_ID the right to do this, or check AWS_SECRET_ACCESS_KEY",
    "INVALID_ACCESS_KEY_ID": "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "INVALID_CLIENT_TOKEN_ID": "check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN",
    "SIGNATURE_DOES_NOT_MATCH": "check AWS_SECRET_ACCESS_KEY",
    "INVALID_SIGNATURE": "check AWS_SECRET_ACCESS_KEY",
    "MISSING_AUTHENTICATION_TOKEN": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "EXPIRED_TOKEN": "renew AWS_SESSION_TOKEN and its keys",
    "REQUEST_EXPIRED": "set this node's clock",
    "REQUEST_TIME_TOO_SKEWED": "set this node's clock",
    "NO_SUCH_BUCKET": "create the bucket, or mend its name in the recipe",
    "PERMISSION_DENIED": "give the account of GOOGLE_APPLICATION_CREDENTIALS the right to do this",
    "UNAUTHENTICATED": "set GOOGLE_APPLICATION_CREDENTIALS to a file with a key",
}
"""What no later try mends, by the name that pyarrow's message has, and what to do."""


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI and the path on it; what follows the bucket's name is taken as it is written.

    Raises:
        ConfigError: the URI holds options or a key, which belong in the environment.
    """
    scheme, _, path = uri.partition("://")
    if re.search(r"\?\w+=", path) or "@" in path.split("/")[0]:
        action = "set AWS_ENDPOINT_URL, AWS_REGION and the keys in the environment of every node"
        raise ConfigError("uri", uri, "must be a bucket and a path alone", action)
    if scheme == "s3":
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        return _connect_s3(path.split("/")[0], environment, os.getpid()), path
    if scheme in ("gs", "gcs"):
        return _connect_gcs(os.getpid()), path
    system, path = fs.FileSystem.from_uri(uri)
    return system, path


@functools.lru_cache(maxsize=16)
def _connect_s3(bucket: str, environment: tuple[tuple[str, str], ...], _pid: int) -> fs.S3FileSystem:
    """Return a connection, kept for as long as the environment stays; a forked process has its own."""
    given = dict(environment)
    endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    region = given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    attempts = int(given.get("AWS_MAX_ATTEMPTS", MAX_ATTEMPTS))
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        allow_delayed_open=True,  # a small file is one request
    )


@functools.lru_cache(maxsize=16)
def _connect_gcs(_pid: int) -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=60))


def explain(uri: str, error: OSError) -> StorageRefused | StorageUnavailable:
    """Return what a failure of an object store means for who runs the job."""
    text = " ".join(str(error).split())
    name = next(
        (name for name in REFUSALS if re.search(rf"\b{name.replace('_', '[ _]?')}\b", text, re.IGNORECASE)), None
    )
    status = re.search(r"HTTP status (\d+)", text)
    if name is not None:
        return StorageRefused(uri, text, "must be open to this process", REFUSALS[name])
    if status is not None and status[1].startswith("4") and status[1] not in ("408", "429"):
        action = "check the URI, AWS_ENDPOINT_URL and AWS_REGION"
        return StorageRefused(uri, text, "must be a request the store accepts", action)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    place = f"AWS_ENDPOINT_URL ({endpoint})" if endpoint else "the network"
    return StorageUnavailable(uri, text, f"check {place} and submit again; what is finished is kept")


def _is_named(name: str, text: str) -> bool:
    """Tell whether a message has a name, as ACCESS_DENIED or as "Access Denied"."""
    return re.search(rf"\b{name.replace('_', '[ _]?')}\b", text, re.IGNORECASE) is not None
