"""Settings of the import_hf stage."""

import dataclasses
from typing import Annotated

import pydantic

from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import settings

MAX_SHARD_BYTES = 5 << 30
"""Hugging Face's habit."""


@settings
class ImportSettings:
    """Which folder becomes a checkpoint."""

    path: str
    """Folder of a DeepSeek-V2, DeepSeek-V3, Llama, Qwen2 or Qwen3 model: config.json, safetensors, tokenizer.json; on
    the disk of the node that runs the job, or on an object store."""
    source: str = "Hugging Face folder"
    """Where it comes from, for those who trace what was made of it: an address, a revision."""
    licence: str = "unknown"
    """Its licence, as its model card says."""
    max_shard_bytes: Annotated[int, pydantic.Field(ge=1)] = MAX_SHARD_BYTES
    """Size from which the next tensor starts a new file; about as much memory is used."""

    def with_root(self, root: str | None, *, where: str) -> "ImportSettings":
        """Return the same settings with a relative path below `root`.

        Raises:
            ConfigError: the path is relative and there is no root.
        """
        path = absolute_path(self.path.rstrip("/") or "/", root, field=f"{where}.path")
        return dataclasses.replace(self, path=path)
