"""Settings of the tokenize_chat stage."""

import dataclasses
from typing import Annotated, Literal

import pydantic

from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.errors import ConfigError


@settings
class ChatFiles:
    """Files of conversations: jsonl (also .gz and .zst) or parquet, told apart by name."""

    glob: Annotated[str, OUTPUT_UNCHANGED]
    """Files to read: an absolute path or an s3:// or gs:// URI; `*` and `?` stay within a folder, `**` does not."""
    source: str
    """Where the conversations come from, recorded in the manifest."""
    licence: str
    """Their licence, recorded in the manifest."""


@settings
class TokenizeChatSettings:
    """Settings of the tokenize_chat stage.

    A record of `chat` has `messages`, a list of {role, content}. One of `preference` has a `prompt` (text, or
    messages) and the answers `chosen` and `rejected` (text, or messages).
    """

    inputs: tuple[ChatFiles, ...]
    """The files; each becomes one shard of each split."""
    task: Literal["chat", "preference"] = "chat"
    """`chat`: every assistant's message is learnt; `preference`: pairs of answers, for DPO."""
    template: Annotated[str | None, OUTPUT_UNCHANGED] = None
    """A jinja file with the chat template, an absolute path or URI; absent = the tokenizer's own, or else ours."""
    validation_fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.05
    """Share of the conversations that is held out for validation, by a hash of their text."""
    seed: int = 0
    """Selects other conversations for validation."""
    max_running_units: Annotated[pydantic.PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Files in work at a time; without it, as many as the cluster has CPUs."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("inputs", "empty", "must hold one table of files or more", "add `glob`, source, licence")

    def with_root(self, root: str | None, *, where: str) -> "TokenizeChatSettings":
        """Return the same settings with relative paths below `root`.

        Raises:
            ConfigError: a path is relative and there is no root.
        """
        inputs = tuple(
            dataclasses.replace(files, glob=absolute_path(files.glob, root, field=f"{where}.inputs.{i}.glob"))
            for i, files in enumerate(self.inputs)
        )
        template = self.template and absolute_path(self.template, root, field=f"{where}.template")
        return dataclasses.replace(self, inputs=inputs, template=template)
