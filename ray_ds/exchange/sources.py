"""Which files of a Hugging Face folder are read, and what they hold. Needs no torch."""

import json
from concurrent.futures import ThreadPoolExecutor

from ray_ds import storage
from ray_ds.artifacts import SourceFile
from ray_ds.config.import_hf import ImportSettings
from ray_ds.errors import InputError
from ray_ds.tokenizer_files import SPECIAL_IDS_FILE, TOKENIZER_FILES

CONFIG_FILES = ("config.json", "generation_config.json")
_NUM_HASH_THREADS = 8


def find_files(folder: str) -> list[str]:
    """Return the names of the files that an import reads, sorted.

    Raises:
        InputError: the folder has no config.json.
    """
    names = {entry.path for entry in storage.list_files(folder) if "/" not in entry.path}
    if "config.json" not in names:
        value = "no config.json" if names else "no such folder, or empty"
        raise InputError("path", f"{folder}: {value}", "must be a folder of a Hugging Face model", "correct the path")
    wanted = {name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if name in names} - {SPECIAL_IDS_FILE}
    return sorted(wanted | {name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))})


def fingerprint(settings: ImportSettings) -> list[SourceFile]:
    """Return every file that an import reads, with its sha256.

    Raises:
        InputError: as `find_files`.
    """
    uris = [storage.join(settings.path, name) for name in find_files(settings.path)]
    with ThreadPoolExecutor(_NUM_HASH_THREADS) as pool:
        digests = list(pool.map(storage.sha256_of_version, uris))
    sizes = {entry.path: entry.bytes for entry in storage.list_files(settings.path)}
    return [
        SourceFile(
            uri=uri,
            bytes=sizes[uri.rsplit("/", 1)[-1]],
            sha256=digest,
            source=settings.source,
            licence=settings.licence,
        )
        for uri, digest in zip(uris, digests, strict=True)
    ]


def read_json(uri: str) -> dict[str, object]:
    """Return a JSON file's table; an absent file's is empty.

    Raises:
        InputError: it is damaged.
    """
    if not storage.exists(uri):
        return {}
    data = storage.read_bytes(uri)
    try:
        values = json.loads(data)
    except ValueError as error:
        raise InputError(uri, f"{len(data)} bytes", f"must be JSON ({error})", "copy it again") from error
    if not isinstance(values, dict):
        raise InputError(uri, type(values).__name__, "must be a JSON object", "copy it again")
    return values
