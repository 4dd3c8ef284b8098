"""A unit's records are all accounted for, and its files depend on its input alone."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pyarrow import BufferReader, parquet

from ray_ds.config.clean import CleanSettings
from ray_ds.data import clean_text
from ray_ds.data.clean_text import Cleaned, clean_records, clean_unit
from ray_ds.data.counts import SAMPLE_CHARS, Counts, LostRecordsError, counts_from_json, merge_counts
from ray_ds.data.readers import Record
from ray_ds.data.units import fingerprint_inputs, plan_units
from tests.data.raw_files import good_text, jsonl, settings_for

NUM_GOOD, NUM_SHORT, NUM_BAD = 40, 5, 3


def _settings(folder: Path, **changes: object) -> CleanSettings:
    records = [{"text": good_text(i)} for i in range(NUM_GOOD)] + [{"text": "Too short."}] * NUM_SHORT
    (folder / "a.jsonl").write_bytes(jsonl(*records) + b"{broken\n" * NUM_BAD)
    return settings_for(str(folder / "a.jsonl"), **changes)


def _clean(settings: CleanSettings) -> tuple[Counts, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    units = plan_units(settings, fingerprint_inputs(settings))
    facts = [clean_unit(unit, settings, files.__setitem__, folder="parts") for unit in units]
    return merge_counts(counts_from_json(fact["counts"]) for fact in facts), files


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    counts, files = _clean(_settings(tmp_path))
    assert (counts.num_in, counts.num_kept) == (NUM_GOOD + NUM_SHORT + NUM_BAD, NUM_GOOD)
    assert (counts.num_dropped, counts.quarantined) == (NUM_SHORT, {"bad_json": NUM_BAD})
    counts.check("test")
    damaged = parquet.read_table(BufferReader(files["quarantine/00000.parquet"]))
    assert damaged.column("excerpt").to_pylist() == [b"{broken"] * NUM_BAD


def test_totals_do_not_depend_on_the_size_of_units(tmp_path: Path) -> None:
    whole, _ = _clean(_settings(tmp_path))
    cut, files = _clean(_settings(tmp_path, unit_bytes=4096))
    assert len([path for path in files if path.endswith(".keys")]) > 2
    assert (cut.num_in, cut.num_kept, cut.dropped, cut.languages) == (
        whole.num_in,
        whole.num_kept,
        whole.dropped,
        whole.languages,
    )


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert _clean(settings)[1] == _clean(settings)[1]


@pytest.mark.parametrize("is_masked", [True, False])
def test_samples_of_dropped_documents_are_masked_like_kept_ones(tmp_path: Path, is_masked: bool) -> None:
    address = "martha.harbour@example.com"
    # One address whole, and one that the end of the sample cuts in its middle.
    text = f"Write {address} {'x' * (SAMPLE_CHARS - 6 - len(address) - 2 - 10)} {address}"
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": text}))
    counts, _ = _clean(settings_for(str(tmp_path / "b.jsonl"), mask_pii=is_masked))
    ((sample,),) = counts.samples.values()
    assert len(sample.text) == SAMPLE_CHARS or is_masked
    assert ("martha" in sample.text) != is_masked and ("<EMAIL>" in sample.text) == is_masked


@pytest.mark.parametrize("change", ["lose", "double"])
def test_a_lost_or_doubled_record_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    def careless(records: Iterable[Record], settings: CleanSettings) -> Iterator[Cleaned | Record]:
        for number, item in enumerate(clean_records(records, settings)):
            yield from [item] * ({"lose": 0, "double": 2}[change] if number == 7 else 1)

    monkeypatch.setattr(clean_text, "clean_records", careless)
    with pytest.raises(LostRecordsError, match="48 records in, but"):
        _clean(_settings(tmp_path))
