"""Count what became of every record, and prove that none was lost."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pydantic
from pydantic import JsonValue

from ray_ds.data.filters import DUPLICATE
from ray_ds.data.pii import Masked
from ray_ds.errors import RayDsError

SAMPLES_PER_REASON = 5
SAMPLE_CHARS = 300


class LostRecordsError(RayDsError):
    """Records went in that were neither kept nor dropped nor quarantined, or came out more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The beginning of a dropped document, for a person to judge the rules by."""

    doc_id: str
    language: str
    text: str


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the records of a work unit, or of many."""

    num_in: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """By the first rule that was broken."""
    broken: dict[str, int] = field(default_factory=dict)
    """By every rule that was broken; a document may count several times."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """By the kind of damage."""
    languages: dict[str, dict[str, int]] = field(default_factory=dict)
    """Language -> kept or a reason -> documents."""
    masked: dict[str, int] = field(default_factory=dict)
    """Addresses masked in kept documents, by kind."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """The first dropped documents of each reason."""

    @property
    def num_dropped(self) -> int:
        """Return the number of dropped documents."""
        return sum(self.dropped.values())

    @property
    def num_quarantined(self) -> int:
        """Return the number of damaged records."""
        return sum(self.quarantined.values())

    def add_kept(self, language: str, masked: Masked | None) -> None:
        """Count a kept document."""
        self.num_kept += 1
        _add(self.languages.setdefault(language, {}), {"kept": 1})
        if masked is not None:
            _add(self.masked, {"email": masked.num_emails, "ip": masked.num_ips, "phone": masked.num_phones})

    def add_dropped(self, reason: str, broken: Iterable[str], language: str, make_sample: Callable[[], Sample]) -> None:
        """Count a dropped document; a sample is made of it only if it is one of the first."""
        _add(self.dropped, {reason: 1})
        _add(self.broken, dict.fromkeys(broken, 1))
        _add(self.languages.setdefault(language, {}), {reason: 1})
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_PER_REASON:
            samples.append(make_sample())

    def add_quarantined(self, damage: str) -> None:
        """Count a damaged record."""
        _add(self.quarantined, {damage: 1})

    def add_duplicates(self, language: str, count: int) -> None:
        """Turn kept documents into dropped ones."""
        self.num_kept -= count
        _add(self.dropped, {DUPLICATE: count})
        _add(self.languages[language], {"kept": -count, DUPLICATE: count})

    def check(self, where: str) -> None:
        """Check that in = kept + dropped by reason + quarantined, in all and by language.

        Raises:
            LostRecordsError: it is not so.
        """
        num_out = self.num_kept + self.num_dropped + self.num_quarantined
        num_by_language = sum(sum(outcomes.values()) for outcomes in self.languages.values()) + self.num_quarantined
        if self.num_in != num_out or self.num_in != num_by_language:
            raise LostRecordsError(
                f"{where}: {self.num_in} records in, but {self.num_kept} kept + {self.num_dropped} dropped + "
                f"{self.num_quarantined} quarantined = {num_out} (by language {num_by_language})"
            )


_ADAPTER = pydantic.TypeAdapter(Counts)


def counts_to_json(counts: Counts) -> JsonValue:
    """Return counts as JSON values."""
    encoded: JsonValue = _ADAPTER.dump_python(counts, mode="json")
    return encoded


def counts_from_json(value: JsonValue) -> Counts:
    """Return what `counts_to_json` was given."""
    return _ADAPTER.validate_python(value)


def merge_counts(parts: Iterable[Counts]) -> Counts:
    """Return the sum of counts; samples are the first of each reason, in order of parts."""
    total = Counts()
    for part in parts:
        total.num_in += part.num_in
        total.num_kept += part.num_kept
        _add(total.dropped, part.dropped)
        _add(total.broken, part.broken)
        _add(total.quarantined, part.quarantined)
        _add(total.masked, part.masked)
        for language, outcomes in part.languages.items():
            _add(total.languages.setdefault(language, {}), outcomes)
        for reason, samples in part.samples.items():
            held = total.samples.setdefault(reason, [])
            held += samples[: SAMPLES_PER_REASON - len(held)]
    return total


def _add(total: dict[str, int], part: Mapping[str, int]) -> None:
    for name, count in part.items():
        total[name] = total.get(name, 0) + count
