"""Which layers of a model become FP8's, and that nothing but their products changes."""

import dataclasses

import torch
from torch import nn

from ray_ds.config.presets import PRESETS
from ray_ds.model.experts import Experts
from ray_ds.model.fp8 import Fp8Experts, Fp8Linear, to_fp8

CPU = torch.device("cpu")


def test_layers_of_aligned_widths_are_replaced_and_parameters_stay() -> None:
    model = nn.ModuleDict({"even": nn.Linear(32, 48), "odd": nn.Linear(32, 7), "norm": nn.LayerNorm(32)})
    before = dict(model.named_parameters())
    assert to_fp8(model, CPU) == 1
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert type(model["even"]) is Fp8Linear and type(model["odd"]) is nn.Linear


def test_experts_are_replaced_where_they_are_wide_enough_to_gain() -> None:
    kinds = {}
    for preset in ("moe_1b", "deepseek_v2_lite", "deepseek_v3"):
        few = dataclasses.replace(PRESETS[preset], n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)
        with torch.device("meta"):
            model = nn.ModuleDict({"experts": Experts(few)})
        to_fp8(model, CPU)
        kinds[preset] = type(model["experts"])
    assert kinds == {"moe_1b": Experts, "deepseek_v2_lite": Fp8Experts, "deepseek_v3": Fp8Experts}
