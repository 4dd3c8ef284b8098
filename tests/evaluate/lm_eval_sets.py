"""A folder of lm-evaluation-harness's task files with local data, for tests."""

import json
from pathlib import Path
from typing import Any

from tests.evaluate.tiny_tasks import write_jsonl

ITEMS = [{"q": f"the sky {i}?", "options": ["yes", "no"], "right": i % 2} for i in range(6)]
CHOICE: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{q}} Answer:",
    "doc_to_choice": "options",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN: dict[str, Any] = {
    **{name: value for name, value in CHOICE.items() if name != "doc_to_choice"},
    "output_type": "generate_until",
    "doc_to_target": "{{options[right]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


def write_sets(folder: Path, **tasks: dict[str, Any]) -> Path:
    """Write the items and a task file for each of some tasks, by name."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "items.jsonl", *ITEMS)
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **task}))  # JSON is YAML
    return folder
