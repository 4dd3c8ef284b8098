"""The state of fp16's loss scale."""

from collections.abc import Mapping

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from pydantic import JsonValue

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes while training; the rest of DeepSpeed's `DynamicLossScaler` are settings."""


def scaler_fields(scaler: DynamicLossScaler) -> dict[str, JsonValue]:
    """Return the fields that make another scaler go on as this one would."""
    return {name: getattr(scaler, name) for name in FIELDS}


def restore_scaler(scaler: DynamicLossScaler, fields: Mapping[str, JsonValue]) -> None:
    """Make a scaler go on as the one whose fields these are."""
    for name in FIELDS:
        value = fields[name]
        setattr(scaler, name, float(value) if name == "cur_scale" else int(value))  # type: ignore[arg-type]
