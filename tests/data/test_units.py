"""Which files are read, and how they are cut into units."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_ds.config.clean import CleanSettings, InputFiles
from ray_ds.data.readers import read_unit
from ray_ds.data.units import fingerprint_inputs, plan_units
from ray_ds.errors import ConfigError, InputError
from tests.data.raw_files import jsonl, read_all, settings_for


def test_cutting_a_file_neither_loses_nor_doubles_a_line(tmp_path: Path) -> None:
    lines = [{"text": "x" * (i * 37 % 900)} for i in range(400)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*lines))
    whole = read_all(settings_for(str(tmp_path / "a.jsonl")))
    for unit_bytes in (4096, 4097, 5000, 100_000):
        settings = settings_for(str(tmp_path / "a.jsonl"), unit_bytes=unit_bytes)
        assert read_all(settings) == whole, unit_bytes
    assert [record.text for record in whole] == [line["text"] for line in lines]


def test_small_files_share_a_unit_and_row_groups_are_cut(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl({"text": name}))
    table = pa.table({"text": [f"{i}" * 200 for i in range(1000)]})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=100, use_dictionary=False)
    settings = settings_for(str(tmp_path / "*"), unit_bytes=50_000)
    units = plan_units(settings, fingerprint_inputs(settings))
    assert [piece.file.uri[-7:] for piece in units[0].pieces][:3] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(units) > 3
    assert sum(1 for unit in units for _ in read_unit(unit)) == 1003


def test_copies_of_a_file_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl({"text": "same"}))
    first, second = read_all(settings_for(str(tmp_path / "*.jsonl")))
    assert first.doc_id != second.doc_id


@pytest.mark.parametrize(
    "changes",
    [{"source": "b"}, {"licence": "b"}, {"licence": None, "licence_column": "text"}, {"id_column": "text"}],
    ids=str,
)
def test_a_unit_is_another_if_its_file_is_read_in_another_way(tmp_path: Path, changes: dict[str, str | None]) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "x"}))
    table = InputFiles(glob=str(tmp_path / "*.jsonl"), source="a", licence="a")
    first, second, moved = (
        _input_hash(files)
        for files in (table, dataclasses.replace(table, **changes), dataclasses.replace(table, glob=f"{tmp_path}/a.*"))
    )
    assert first != second and first == moved


def test_a_unit_is_another_if_the_name_of_its_file_says_another_format(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a.jsonl", "a.txt", "a.txt.gz"):
        (tmp_path / name).write_bytes(b'{"text": "x"}')
        hashes.add(_input_hash(InputFiles(glob=str(tmp_path / name), source="a", licence="a")))
    assert len(hashes) == 3


def _input_hash(files: InputFiles) -> str:
    settings = CleanSettings(inputs=(files,))
    (unit,) = plan_units(settings, fingerprint_inputs(settings))
    return unit.input_hash


def test_fingerprints_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello")
    (source,) = fingerprint_inputs(settings_for(str(tmp_path / "a.txt")))
    assert (source.sha256, source.bytes) == (hashlib.sha256(b"hello").hexdigest(), 5)


def test_bad_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must match a file or more; it matches none"):
        fingerprint_inputs(settings_for(str(tmp_path / "*.jsonl")))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="are empty; one must hold text"):
        fingerprint_inputs(settings_for(str(tmp_path / "*.jsonl")))
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    with pytest.raises(InputError, match=r"must end in \.jsonl, \.ndjson, \.parquet or \.txt"):
        fingerprint_inputs(settings_for(str(tmp_path / "b.pdf")))
    with pytest.raises(ConfigError, match="must be absolute"):
        fingerprint_inputs(settings_for("raw/*.txt"))
    (tmp_path / "c.txt").write_bytes(b"text")
    with pytest.raises(ConfigError, match="must not name columns where all files are txt"):
        fingerprint_inputs(settings_for(str(tmp_path / "c.txt"), id_column="id"))


def test_a_parquet_column_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column text \(int64\) must hold strings"):
        read_all(settings_for(str(tmp_path / "a.parquet")))
    with pytest.raises(InputError, match=r"column story \(missing\) must be one of the file's columns: body, text"):
        read_all(settings_for(str(tmp_path / "a.parquet"), text_column="story"))
