"""Settings of the clean stage: defaults, refusals, and what their digest covers."""

import pytest

from ray_ds.config.clean import CleanSettings, InputFiles
from ray_ds.config.settings import digest_settings, field_docs
from ray_ds.errors import ConfigError


def _files(**changes: object) -> InputFiles:
    return InputFiles(**{"glob": "/data/*.jsonl", "source": "web", "licence": "CC0-1.0", **changes})  # type: ignore[arg-type]


def test_source_and_its_column_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"source \(both\) must be given, or else source_column, and not both"):
        _files(source_column="origin")


def test_a_licence_is_required() -> None:
    with pytest.raises(ConfigError, match=r"licence \(neither\) must be given, or else licence_column"):
        _files(licence=None)


def test_columns_of_txt_files_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text_column \(body\) must not be given for txt files"):
        _files(format="txt", text_column="body")


def test_inputs_and_languages_are_required() -> None:
    with pytest.raises(ConfigError, match=r"inputs \(empty\) must hold one table of files or more"):
        CleanSettings(inputs=())
    with pytest.raises(ConfigError, match="must be one language or more, each once"):
        CleanSettings(inputs=(_files(),), languages=("en", "en"))


def test_relative_globs_are_put_below_the_root_or_refused() -> None:
    settings = CleanSettings(inputs=(_files(glob="raw/*.txt"),))
    assert settings.with_root("/data", where="demo: clean").inputs[0].glob == "/data/raw/*.txt"
    with pytest.raises(ConfigError, match=r"inputs.0.glob \(raw/\*.txt\) must be absolute"):
        settings.with_root(None, where="demo: clean")


def test_concurrency_is_no_part_of_the_digest() -> None:
    one, two = (CleanSettings(inputs=(_files(),), max_running_units=n) for n in (1, 2))
    assert digest_settings(one) == digest_settings(two)
    assert digest_settings(one) != digest_settings(CleanSettings(inputs=(_files(),), mask_pii=False))


def test_every_field_is_explained() -> None:
    assert all({**field_docs(CleanSettings), **field_docs(InputFiles)}.values())
