"""Clean one work unit: read, mend, judge, mask, key; publish what is kept and account for every record."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import batched
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ray_ds.config.clean import CleanSettings
from ray_ds.config.settings import JsonValue
from ray_ds.data.counts import SAMPLE_CHARS, Counts, LostRecordsError, Outcome, Sample, counts_to_json
from ray_ds.data.exact import duplicate_key
from ray_ds.data.filters import RULES, judge
from ray_ds.data.language import UNKNOWN, detect_language
from ray_ds.data.normalise import normalise_text
from ray_ds.data.pii import Masked, mask_pii
from ray_ds.data.readers import Record, read_unit
from ray_ds.data.units import Unit
