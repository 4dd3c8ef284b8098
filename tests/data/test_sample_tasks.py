import json
from collections import Counter
from pathlib import Path
from typing import Any

from ray_ds.data.sample_tasks import write_sample_tasks
from ray_ds.data.sample_text import king_james_chapters


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_tasks_have_right_answers_and_are_always_the_same(tmp_path: Path) -> None:
    counts = write_sample_tasks(str(tmp_path))
    sets = {path.stem: read(path) for path in tmp_path.iterdir()}
    assert {name: len(items) for name, items in sets.items()} == counts
    assert counts["endings"] == counts["next_words"] == 200 and counts["kinds"] > 50
    book = " ".join(" ".join(chapter["text"].split()) for chapter in king_james_chapters())
    for item in sets["endings"]:
        assert len(set(item["endings"])) == 4
        assert f"{item['opening']} {item['endings'][item['right']]}" in book
    assert len(Counter(item["right"] for item in sets["endings"])) == 4  # no place is always right
    for item in sets["next_words"]:
        assert f"{item['opening']} {item['next']}" in book
    assert Counter(item["kind"] for item in sets["kinds"])["software"] == counts["kinds"] / 2

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_sample_tasks(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
