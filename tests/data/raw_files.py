"""Raw files for tests: good documents, and settings that read a folder."""

import json
from pathlib import Path

from ray_ds.config.clean import CleanSettings, InputFiles
from ray_ds.data.readers import Record, read_unit
from ray_ds.data.units import fingerprint_inputs, plan_units

GOOD = (
    "The harbour lay quiet in the early morning, and the boats had not yet gone out to sea. Old Martha walked along "
    "the wall with a basket on her arm, as she had done on every day of her life that she could remember. She counted "
    "the gulls, nodded to the keeper of the light, and thought of the letter that was waiting for her at home."
)


def good_text(number: int) -> str:
    """Return a document that every rule keeps, different for each number."""
    return f"{GOOD} It was the visit with number {number} to that place."


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def settings_for(pattern: str, **changes: object) -> CleanSettings:
    files = {name: changes.pop(name) for name in ("id_column", "format", "text_column") if name in changes}
    inputs = (InputFiles(glob=pattern, source="test", licence="CC0-1.0", **files),)  # type: ignore[arg-type]
    return CleanSettings(inputs=inputs, **changes)  # type: ignore[arg-type]


def read_all(settings: CleanSettings) -> list[Record]:
    return [record for unit in plan_units(settings, fingerprint_inputs(settings)) for record in read_unit(unit)]


def read_bytes(folder: Path, name: str, data: bytes, **changes: object) -> list[Record]:
    (folder / name).write_bytes(data)
    return read_all(settings_for(str(folder / name), **changes))
