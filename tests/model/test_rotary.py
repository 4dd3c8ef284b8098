import dataclasses

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from ray_ds.config.presets import PRESETS
from ray_ds.model.rotary import rotary_tables, rotate, rotate_halves

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


@pytest.mark.parametrize("preset", ["tiny", "llama_369m"])
def test_a_compiled_pass_makes_the_same_tables_once_and_without_a_graph_break(preset):
    config = PRESETS[preset]
    turn = rotate if config.attention == "mla" else rotate_halves
    x = torch.randn(2, 5, 3, config.rope_dim, generator=torch.Generator().manual_seed(0))

    def turned(x, positions):
        return turn(x, rotary_tables(positions, config)).sin()

    positions = torch.arange(5)[None]
    out, codes = run_and_get_code(torch.compile(turned, fullgraph=True), x, positions)
    torch.testing.assert_close(out, turned(x, positions))
    (code,) = codes
    assert "ray_ds.rotary_tables" in code and "cos(" not in code
