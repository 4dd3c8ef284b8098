"""Items are read from jsonl and parquet, plain and compressed; what is damaged is named by file and line."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.lm_eval import LmEvalSettings
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.task_files import fingerprint_tasks, read_items
from tests.data.fake_store import BUCKET, FakeStore
from tests.evaluate.tiny_tasks import CHOOSE, task, write_jsonl

ROWS = [{"question": "Wo?", "options": ["a", "ü"]}, {"question": "q2", "options": ["c", "d"]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(folder: Path, name: str) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(LINES))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\n\n", 1))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.JSONL.zst", "a.parquet"])
def test_every_format_gives_the_same_items(tmp_path: Path, name: str) -> None:
    items = read_items(task(write(tmp_path, name), choose=CHOOSE))
    assert [item.values for item in items] == ROWS
    assert [item.row for item in items] == ([1, 3] if name in ("a.jsonl", "a.ndjson") else [1, 2])
    assert items[0].name == f"{name}:1"
    assert items[0].place == f"{tmp_path}/{name} {'row' if name.endswith('parquet') else 'line'} 1"


def test_a_set_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore(root=tmp_path, log=tmp_path / "log")
    monkeypatch.setattr("ray_ds.storage.filesystem", store.filesystem)
    write(tmp_path, "a.jsonl")
    assert [item.values for item in read_items(task(f"{BUCKET}/a.jsonl", choose=CHOOSE))] == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "q"', 'b.jsonl line 3 ({"question": "q") must be a JSON object (Expecting'),
        (b"[1]", "b.jsonl line 3 (list) must be a JSON object; mend or remove the line."),
        (b'{"question": "\xff"}', "must be a JSON object ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(LINES + line + b"\n")
    with pytest.raises(InputError) as caught:
        read_items(task(str(tmp_path / "b.jsonl"), choose=CHOOSE))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl.gz", "c.jsonl.zst"])
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    path = Path(write(tmp_path, name))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=rf"{name} \(.*must be a whole"):
        read_items(task(str(path), choose=CHOOSE))


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must match a file or more; it matches none"):
        read_items(task(str(tmp_path / "*.jsonl"), choose=CHOOSE))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"a.csv\) must end in .jsonl, .ndjson"):
        read_items(task(str(tmp_path / "a.csv"), choose=CHOOSE))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"must hold an item or more"):
        read_items(task(str(tmp_path / "empty.jsonl"), choose=CHOOSE))
    with pytest.raises(ConfigError, match=r"files \(a.jsonl\) must be absolute"):
        read_items(task("a.jsonl", choose=CHOOSE))


def test_fingerprints_name_every_file_with_its_task(tmp_path: Path) -> None:
    one, two = write_jsonl(tmp_path / "1.jsonl", *ROWS), write_jsonl(tmp_path / "2.jsonl", *ROWS[:1])
    asked = task(one, choose=CHOOSE, shots=1, shot_files=two, source="ours", licence="CC0-1.0")
    found = fingerprint_tasks(EvaluateSettings(seq_len=8, tasks=(asked,)))
    assert [(own.uri, own.source, own.licence) for own in found] == [
        (one, "files of task t: ours", "CC0-1.0"),
        (two, "shot_files of task t: ours", "CC0-1.0"),
    ]
    assert found[0].sha256 != found[1].sha256


def test_all_files_of_lm_evals_folder_are_fingerprinted(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    own = LmEvalSettings(include_path=str(folder), tasks=("mine",), source="us", licence="CC0-1.0")
    with pytest.raises(InputError) as caught:
        fingerprint_tasks(EvaluateSettings(seq_len=8, lm_eval=own))
    assert str(caught.value) == (
        f"lm_eval.include_path ({folder}) must be a folder with a task's .yaml file; there is none; check the path."
    )
    for name in ("mine.yaml", "data/items.jsonl", "code.py", "__pycache__/code.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    found = fingerprint_tasks(EvaluateSettings(seq_len=8, lm_eval=own))
    assert [source.uri for source in found] == [f"{folder}/{n}" for n in ("code.py", "data/items.jsonl", "mine.yaml")]
    assert found[0].sha256 == hashlib.sha256(b"code.py").hexdigest()
    assert {(source.source, source.licence) for source in found} == {("lm_eval: us", "CC0-1.0")}
