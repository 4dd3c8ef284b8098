import dataclasses

import torch

from ray_ds.config.presets import PRESETS
from ray_ds.model.rotary import rotary_tables, rotate

TINY = PRESETS["tiny"]


def test_rotation_turns_pairs_by_position():
    config = dataclasses.replace(TINY, qk_rope_head_dim=4, rope_theta=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    out = rotate(x, rotary_tables(torch.tensor([[3]]), config)).flatten()
    a, b = torch.tensor(3.0), torch.tensor(0.3)
    torch.testing.assert_close(out, torch.stack([a.cos(), a.sin(), -2 * b.sin(), 2 * b.cos()]))


def test_tables_are_fp32_at_positions_that_bf16_cannot_hold():
    cos, _ = rotary_tables(torch.tensor([[1_000_001]]), TINY)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0, 0, 0], torch.tensor(1_000_001.0).double().cos().float())
