"""Settings of the tokenize stage."""

from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, settings

HoldOut = Literal["document", "group"]


@settings
class TokenizeSettings:
    """Settings of the tokenize stage."""

    validation_fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.05
    """Share of the documents (or groups) that is held out for validation, by a hash of their ids."""
    hold_out: HoldOut = "document"
    """What is held out as a whole: `document`, or `group`: documents whose own ids (`id_column` of the clean step)
    agree up to the last `:` or `/`, such as the chapters of a book, which would give each other away."""
    seed: int = 0
    """Selects other documents for validation."""
    max_running_units: Annotated[pydantic.PositiveInt | None, OUTPUT_UNCHANGED] = None
    """Files of the corpus in work at a time; without it, as many as the cluster has CPUs."""
