import json

import deepspeed
import pytest
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from ray_ds.train.zero.scaler import FIELDS, restore_scaler, scaler_fields


def new_scaler(init_scale: float = 2.0**16) -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=init_scale, scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )


@pytest.fixture
def overflows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which steps overflow; DeepSpeed asks for the rank when one does."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    return [bool(int(digit)) for digit in "0110000000101100000001000"]


def scales(scaler: DynamicLossScaler, overflows: list[bool]) -> list[float]:
    out = []
    for overflow in overflows:
        scaler.update_scale(overflow)
        out.append(scaler.cur_scale)
    return out


def test_fields_are_deepspeeds() -> None:
    changing = set(vars(new_scaler())) & set(FIELDS)
    assert changing == set(FIELDS), f"DeepSpeed {deepspeed.__version__} renamed fields of DynamicLossScaler"


def test_scale_goes_on_from_any_point(overflows: list[bool]) -> None:
    expected = scales(new_scaler(), overflows)
    assert min(expected) < 2.0**16 < max(expected)
    for saved in range(len(overflows)):
        scaler = new_scaler()
        scales(scaler, overflows[:saved])
        fields = json.loads(json.dumps(scaler_fields(scaler)))
        other = new_scaler(init_scale=1.0)
        restore_scaler(other, fields)
        assert scales(other, overflows[saved:]) == expected[saved:], saved
        assert vars(other) == vars(scaler) | {name: getattr(other, name) for name in FIELDS}
