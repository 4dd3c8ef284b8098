"""Settings of tasks that lm-evaluation-harness asks, an optional package; its task files and their data are local.

[step.settings.lm_eval]
include_path = "sets/lm_eval"
tasks = ["mine"]
"""

from typing import Annotated

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.errors import ConfigError


@settings
class LmEvalSettings:
    """Settings of lm-evaluation-harness's tasks."""

    include_path: Annotated[str, OUTPUT_UNCHANGED]
    """A local folder with all that the tasks are made of: YAML files, Python that these name, and data. In them
    `dataset_path` is `json`, `csv`, `parquet` or `text`, and `data_files` are relative to the folder."""
    tasks: tuple[str, ...]
    """Tasks, groups and tags of these files that are asked."""
    shots: pydantic.NonNegativeInt | None = None
    """Answered examples in front of each question; without it, as each task says."""
    apply_chat_template: bool = False
    """Whether questions are asked in the turns of a chat, by the model's own chat template. An answer is encoded apart
    from the words that ask for it, as chats are learnt."""
    fewshot_as_multiturn: bool | None = None
    """Whether each of the `shots` is a turn of the chat and its answer another, for `apply_chat_template` only, or all
    of them are in the turn of the question; absent = turns."""
    system_instruction: str | None = None
    """What comes before all shots: a chat's system message, before the task's own description, or plain text."""
    max_items: pydantic.PositiveInt | None = None
    """Items of each task to ask at most, the first ones; without it, all."""
    seed: int = 0
    """Of the draws of shots and of resampling for standard errors."""
    source: str = "not stated"
    """Where the items come from, recorded with the result."""
    licence: str = "not stated"
    """The items' licence, recorded with the result."""

    def __post_init__(self) -> None:
        if "://" in self.include_path or not self.include_path:
            allowed = "must be a local folder, which the harness itself reads"
            raise ConfigError("include_path", self.include_path, allowed, "copy the files to one")
        unused = None if self.apply_chat_template else "has no effect without apply_chat_template"
        fill_or_refuse(self, "fewshot_as_multiturn", True, unused=unused)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError("tasks", list(self.tasks), "must be names of tasks, each once", "name one or more")
