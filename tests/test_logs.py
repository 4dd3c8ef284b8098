import logging

import pytest

from ray_ds.logs import Progress, format_event, parse_progress, setup_logging, table_lines


def test_an_event_is_one_line_of_keys_and_values() -> None:
    line = format_event("finished", step="clean", seconds=1.23456789, note="two words", counts={"in": 3}, empty="")
    assert line == 'finished step=clean seconds=1.2346 note="two words" counts={"in":3} empty=""'


def test_newlines_cannot_break_a_line() -> None:
    assert "\n" not in format_event("said", text="one\ntwo")


def test_progress_is_rare_but_never_misses_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ray_ds")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    progress = Progress("train", 100, interval_s=3600.0)
    for done in range(101):
        progress.update(done, loss=1.5)
    assert [record.getMessage() for record in caplog.records] == [
        "progress step=train done=0 total=100 loss=1.5",
        "progress step=train done=100 total=100 loss=1.5",
    ]


def test_progress_lines_are_read_back_with_and_without_a_time() -> None:
    assert parse_progress("progress step=train done=3 total=9") == ("train", 3, 9, "")
    assert parse_progress("12:34:56 progress step=train done=3 total=9 loss=1.5 lr=2\n") == (
        "train",
        3,
        9,
        "loss=1.5 lr=2",
    )
    assert parse_progress("12:34:56 finished step=train") is None


def test_lines_carry_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logging.getLogger("ray_ds").info("started step=clean")
    assert capsys.readouterr().out.rstrip().endswith(" started step=clean")


def test_a_tables_columns_are_aligned() -> None:
    assert table_lines([("task", "score"), ("long name", "1"), ("b", "")]) == ["task       score", "long name  1", "b"]
