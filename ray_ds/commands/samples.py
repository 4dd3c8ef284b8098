"""Commands that write data to try things with, from the packages that this one needs."""

import argparse
from functools import partial
from pathlib import Path

from ray_ds.commands.options import AddParser
from ray_ds.stage_table import load_object

SAMPLES = {
    "sample-text": ("ray_ds.data.sample_text:write_sample_text", "real text", "jsonl.gz"),
    "sample-chats": ("ray_ds.data.sample_chats:write_sample_chats", "questions and answers", "jsonl.gz"),
    "sample-tasks": ("ray_ds.data.sample_tasks:write_sample_tasks", "questions with right answers", "jsonl"),
}
"""What writes each, what it is, and in what format."""


def add_commands(add: AddParser) -> None:
    """Add sample-text, sample-chats and sample-tasks."""
    for name, (function, what, suffix) in SAMPLES.items():
        sample = add(name, help=f"write {what} from installed packages as {suffix}")
        sample.add_argument("folder")
        sample.set_defaults(run=partial(_write, function))


def _write(function: str, options: argparse.Namespace) -> int:
    load_object(function)(str(Path(options.folder).resolve()))
    return 0
