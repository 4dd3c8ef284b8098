"""Every kind of damage is set aside with its place and reason, and the rest is still read."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from ray_ds.data import lines, readers
from ray_ds.data.documents import group_of
from ray_ds.data.readers import check_columns
from ray_ds.data.units import find_input_files
from ray_ds.errors import InputError
from tests.data.raw_files import jsonl, read_all, read_bytes, settings_for

BEFORE = jsonl({"text": "before"})
AFTER = jsonl({"text": "after"})

DAMAGED_LINES = {
    "bad_json": b'{"text": "cut',
    "not_an_object": b'["text"]',
    "missing_column": b'{"body": "x"}',
    "null_value": b'{"text": null}',
    "wrong_type": b'{"text": 7}',
    "invalid_utf8": b'{"text": "\xff\xfe"}',
    "nul_byte": b'{"text": "a\x00b"}',
    "lone_surrogate": b'{"text": "\\ud800"}',
}


@pytest.mark.shows("Damaged lines and files are set aside with file, offset and reason; the rest is read")
@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_a_damaged_line_is_located_and_its_neighbours_are_read(tmp_path: Path, damage: str) -> None:
    first, bad, last = read_bytes(tmp_path, "a.jsonl", BEFORE + DAMAGED_LINES[damage] + b"\n" + AFTER)
    assert (first.text, last.text) == ("before", "after")
    assert (bad.damage, bad.position, bad.uri) == (damage, len(BEFORE), str(tmp_path / "a.jsonl"))
    assert bad.excerpt == DAMAGED_LINES[damage]


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (b'{"text": "a\\u0000b"}', "nul_byte"),
        (b"[" * 100_000, "bad_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "bad_json"),
    ],
)
def test_damage_in_disguise(tmp_path: Path, line: bytes, damage: str) -> None:
    records = read_bytes(tmp_path, "a.jsonl", BEFORE + line + b"\n" + AFTER)
    assert [record.damage for record in records] == ["", damage, ""]


def test_a_gigantic_line_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, readers):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    records = read_bytes(tmp_path, "a.jsonl", BEFORE + jsonl({"text": "x" * 5000}) + AFTER)
    assert [(record.text, record.damage) for record in records] == [("before", ""), (None, "too_long"), ("after", "")]


@pytest.mark.parametrize(("suffix", "damage"), [("gz", "truncated_gzip"), ("zst", "truncated_zstd")])
def test_the_readable_part_of_a_truncated_file_is_read(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = jsonl(*({"text": f"{i} " + str(i * 7919) * 20} for i in range(20_000)))
    data = gzip.compress(lines) if suffix == "gz" else zstandard.compress(lines)
    *good, bad = read_bytes(tmp_path, f"a.jsonl.{suffix}", data[: len(data) // 2])
    assert bad.damage == damage
    assert len(good) > 2000 and all(not record.damage for record in good)
    assert bad.position == lines.index(f'{{"text": "{len(good)} '.encode())


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_is_not_what_its_name_says_is_set_aside(tmp_path: Path, suffix: str) -> None:
    (bad,) = read_bytes(tmp_path, f"a.jsonl.{suffix}", b"plain text, no archive")
    assert bad.damage == {"gz": "bad_gzip", "zst": "bad_zstd"}[suffix]


def test_a_broken_checksum_is_noticed(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(BEFORE + AFTER))
    data[-6] ^= 1
    assert read_bytes(tmp_path, "a.jsonl.gz", bytes(data))[-1].damage == "bad_gzip"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_joined_archives_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    records = read_bytes(tmp_path, f"a.jsonl.{suffix}", compress(BEFORE) + compress(AFTER))
    assert [record.text for record in records] == ["before", "after"]


def test_parquet_rows_and_their_damage(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff", None, b"a\0b", b"last"], pa.binary())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    records = read_all(settings_for(str(tmp_path / "a.parquet")))
    assert [record.damage for record in records] == ["", "invalid_utf8", "null_value", "nul_byte", ""]
    assert [record.position for record in records] == [0, 1, 2, 3, 4]


def test_truncated_parquet_is_set_aside(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (bad,) = read_bytes(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes()[:-10])
    assert (bad.damage, bad.text) == ("bad_parquet", None)


def test_a_broken_row_group_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(30)]})
    parquet.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    records = read_bytes(tmp_path, "a.parquet", bytes(data))
    assert [record.position for record in records] == [*range(10), 10, *range(20, 30)]
    assert [record.damage for record in records if record.damage] == ["bad_parquet"]


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (record,) = read_bytes(tmp_path, "a.txt", "\ufeffOne.\n\nTwo.".encode())
    assert (record.text, record.damage) == ("One.\n\nTwo.", "")
    (bad,) = read_bytes(tmp_path, "b.txt", "café".encode("latin-1"))
    assert (bad.damage, bad.detail) == ("invalid_utf8", "at byte 3 of the record")


def test_doc_ids_name_file_and_record(tmp_path: Path) -> None:
    (named,) = read_bytes(tmp_path, "a.jsonl", jsonl({"text": "x", "id": "kjv/Ruth/1"}), id_column="id")
    assert named.doc_id.endswith(":kjv/Ruth/1") and group_of(named.doc_id) == "kjv/Ruth"
    (placed,) = read_bytes(tmp_path, "b.jsonl", jsonl({"text": "x"}))
    assert placed.doc_id.endswith("-0") and group_of(placed.doc_id) is None
    (numbered,) = read_bytes(tmp_path, "c.jsonl", jsonl({"text": "x", "id": 12}), id_column="id")
    assert numbered.doc_id.endswith("-0:12") and group_of(numbered.doc_id) == "12"


@pytest.mark.parametrize("id_column", [None, "id"])
def test_doc_ids_are_unique_even_where_own_ids_and_files_are_not(tmp_path: Path, id_column: str | None) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl({"text": "x", "id": "same"}, {"text": "y", "id": "same"}))
    records = read_all(settings_for(str(tmp_path / "*.jsonl"), id_column=id_column))
    assert len({record.doc_id for record in records}) == len(records) == 4
    assert {group_of(record.doc_id) for record in records} == {"same" if id_column else None}


def test_a_column_that_all_records_lack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"body": "x", "title": "y"}))
    with pytest.raises(InputError, match=r"column text \(missing\) must be one of the file's columns: body, title"):
        check_columns(find_input_files(settings_for(str(tmp_path / "a.jsonl"))))
