"""Settings of the clean stage: which raw files to read, and what to do to their documents."""

import dataclasses
from typing import Annotated, Literal

import pydantic

from ray_ds.config.paths import absolute_path
from ray_ds.config.settings import OUTPUT_UNCHANGED, settings
from ray_ds.errors import ConfigError

Language = Literal["en", "zh"]
FileFormat = Literal["auto", "jsonl", "parquet", "txt"]
DEFAULT_TEXT_COLUMN = "text"
MIN_UNIT_BYTES = 1 << 12


@settings
class InputFiles:
    """Raw files of one layout."""

    glob: Annotated[str, OUTPUT_UNCHANGED]
    """Files to read: an absolute path or an s3:// or gs:// URI; `*` and `?` stay within a folder, `**` does not."""
    format: FileFormat = "auto"
    """`jsonl` (also .gz and .zst), `parquet`, `txt` (also .gz and .zst; a file is a document); `auto` goes by name."""
    text_column: str = DEFAULT_TEXT_COLUMN
    """The column that holds the text."""
    id_column: str | None = None
    """A column that names each document within its file (a string or a whole number); without it, its position does."""
    source: str | None = None
    """Where the documents come from, recorded with each of them."""
    source_column: str | None = None
    """The column that holds the source, where it differs from document to document."""
    licence: str | None = None
    """The documents' licence, recorded with each of them."""
    licence_column: str | None = None
    """The column that holds the licence, where it differs from document to document."""

    def __post_init__(self) -> None:
        if not self.glob:
            raise ConfigError("glob", self.glob, "must name files", "give an absolute path, such as /data/*.jsonl.gz")
        for name in ("source", "licence"):
            self._check_exactly_one(name, f"{name}_column")
        if self.format == "txt":
            self._check_no_columns()

    def _check_exactly_one(self, plain: str, column: str) -> None:
        values = [value for value in (getattr(self, plain), getattr(self, column)) if value is not None]
        if len(values) != 1 or not values[0]:
            value = "both" if len(values) == 2 else "neither" if not values else "empty"
            raise ConfigError(plain, value, f"must be given, or else {column}, and not both", "give one of the two")

    def _check_no_columns(self) -> None:
        found = self.columns()
        if self.text_column == DEFAULT_TEXT_COLUMN:
            found.remove(DEFAULT_TEXT_COLUMN)
        for name in ("text_column", "id_column", "source_column", "licence_column"):
            if getattr(self, name) in found:
                allowed = "must not be given for txt files, which have no columns"
                raise ConfigError(name, getattr(self, name), allowed, "remove it")

    def columns(self) -> list[str]:
        """Return the columns that every record must have."""
        optional = (self.id_column, self.source_column, self.licence_column)
        return [self.text_column, *(column for column in optional if column is not None)]


@settings
class CleanSettings:
    """Settings of the clean stage."""

    inputs: tuple[InputFiles, ...]
    """The raw files, in the order in which documents are numbered."""
    languages: tuple[Language, ...] = ("en", "zh")
    """Languages to keep; each has its own thresholds of quality and repetition."""
    min_language_score: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Drop a document whose language is less certain than this, by the lid.176 model."""
    mask_pii: bool = True
    """Put `<EMAIL>`, `<IP>` and `<PHONE>` in the place of e-mail addresses, global IP addresses and phone numbers,
    in the corpus and in the report's samples. `quarantine/` holds damaged records as they were found, unmasked, so that
    they can be mended: guard it as you do the raw files."""
    exact_duplicates: bool = True
    """Drop all but the first of documents that are equal but for white space and case, over all inputs."""
    unit_bytes: Annotated[int, pydantic.Field(ge=MIN_UNIT_BYTES)] = 64 << 20
    """Size of a work unit, and about that of the text in a file of the corpus. A compressed file is not cut."""
    max_quarantined_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.001
    """Fail when more than this share of the records is damaged; up to it, they are set aside in `quarantine/`."""
    max_running_units: Annotated[pydantic.PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Work units in flight at a time; without it, as many as the cluster has CPUs."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("inputs", "empty", "must hold one table of files or more", "add `glob`, source, licence")
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise ConfigError(
                "languages", list(self.languages), "must be one language or more, each once", "correct it"
            )

    def with_root(self, root: str | None, *, where: str) -> "CleanSettings":
        """Return the same settings with relative globs below `root`.

        Raises:
            ConfigError: a glob is relative and there is no root.
        """
        inputs = tuple(
            dataclasses.replace(files, glob=absolute_path(files.glob, root, field=f"{where}.inputs.{i}.glob"))
            for i, files in enumerate(self.inputs)
        )
        return dataclasses.replace(self, inputs=inputs)
