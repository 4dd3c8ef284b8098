"""Routed experts whose grouped products are in FP8.

What there is to gain: with N rows, a weight of O x D and its two gradients make 6 N O D FLOPs. Hopper's tensor cores do
1,979e12 a second in FP8 and 989e12 in bf16, which saves 3.0e-15 N O D seconds at the most. Quantizing costs bytes: the
rows coming in and their gradients are read twice in bf16 (for the largest number, then for all), written, and then
read and written once more to lie the other way round: 7 bytes a number, 7 N (O + D), at 4e12 bytes a second. Weights
cost as much a number, but there are fewer of them. So there is nothing to gain unless O D / (O + D) is above 580:
not in an expert of 1024 x 512, and up to 1.6 x in DeepSeek-V3's of 7168 x 2048.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.model.experts import Experts, Layout, lay_out, permute
from ray_ds.model.fp8.numbers import ALIGNMENT, FINE, multiply, quantize

MIN_WIDTH = 580
"""Least O D / (O + D) of an expert's smaller product that FP8 can make faster; see above."""


class Fp8Experts(Experts):
    """Routed experts whose six products, of their outputs and of all gradients, are in FP8, all in E4M3.

    Rows and gradients have one scale, each expert's weight its own. The kernel that sums over rows, for the gradient
    of the weights, starts each expert at a multiple of 16 bytes, hence of 16 rows: so each expert's rows are filled up
    with zeros, which add nothing to any sum. How many is known to the device alone; there is room for the most.
    """

    @classmethod
    def of(cls, experts: Experts) -> "Fp8Experts":
        """Return some with the parameters, the same objects, of others."""
        layer = cls.__new__(cls)  # `__init__` wants a config, and makes parameters of its own
        layer.__dict__.update(experts.__dict__)
        return layer

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return what `Experts` does; in evaluation in full precision."""
        if not self.training:
            return super().forward(x, weights, chosen)
        assert self.elsewhere is None, "settings refuse FP8 with experts on other processes"
        layout = fill_up(lay_out(chosen, self.num_experts))
        rows = permute(x, layout.order, layout.inverse, chosen.shape[1])  # (M, D)
        is_filling = torch.ones_like(layout.order, dtype=torch.bool).scatter_(0, layout.inverse, False)
        rows = rows.masked_fill(is_filling[:, None], 0)
        offsets = layout.ends.int()
        gate, up = grouped_product(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)  # (M, I) each
        rows = grouped_product(F.silu(gate) * up, self.down_proj, offsets)  # (M, D)
        return self.combine(rows, weights, layout).to(x.dtype)


def fill_up(layout: Layout) -> Layout:
    """Return a layout in which each expert has 16 rows or more and a multiple of 16; the last one has all that is left.

    Rows in between are those of choice 0, for want of another.
    """
    sizes = layout.ends.diff(prepend=layout.ends.new_zeros(1))  # (E,)
    filled = ((sizes + ALIGNMENT - 1) // ALIGNMENT).clamp(min=1) * ALIGNMENT
    ends = filled.cumsum(dim=0)
    num_choices, num_experts = len(layout.order), len(sizes)
    most = -(-num_choices // ALIGNMENT) * ALIGNMENT + num_experts * ALIGNMENT
    shift = (ends - filled) - (layout.ends - sizes)  # (E,): by how much each expert's rows move
    expert = torch.searchsorted(layout.ends, torch.arange(num_choices, device=ends.device), right=True)
    place = torch.arange(num_choices, device=ends.device) + shift[expert]  # (N * K,)
    order = torch.zeros(most, dtype=layout.order.dtype, device=ends.device).scatter_(0, place, layout.order)
    ends[-1] = most
    return Layout(order=order, inverse=place[layout.inverse], ends=ends)


def grouped_product(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return each expert's rows times its weight, (M, O), computed in bf16 where not in FP8, in the rows' type.

    Args:
        rows: (M, D), by expert; M and the widths multiples of 16.
        weights: (E, O, D).
        offsets: (E,) int32, where each expert's rows end, in multiples of 16, none equal; the last is M.
    """
    product: Tensor = _GroupedProduct.apply(rows.bfloat16(), weights.bfloat16(), offsets)  # type: ignore[no-untyped-call]
    return product.to(rows.dtype)


class _GroupedProduct(torch.autograd.Function):
    """Keeps rows and weights in FP8 for the way back, half of what bf16 experts keep of the rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Return (M, O)."""
        x8, x_scale = quantize(rows, FINE)
        w8, w_scales = quantize(weights, FINE, dims=(1, 2))
        ctx.save_for_backward(x8, x_scale, w8, w_scales, offsets)
        return _multiply_rows(x8, w8, x_scale, w_scales, offsets, is_rough=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of rows and weights."""
        x8, x_scale, w8, w_scales, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
        g8, g_scale = quantize(grad.contiguous(), FINE)  # the grouped kernel takes no E5M2
        turned = w8.transpose(1, 2).contiguous()  # (E, D, O)
        rows_grad = _multiply_rows(g8, turned, g_scale, w_scales, offsets, is_rough=False)  # (M, D)
        weights_grad = _multiply_columns(g8.T.contiguous(), x8.T.contiguous(), g_scale, x_scale, offsets)  # (E, O, D)
        return rows_grad, weights_grad, None


def _multiply_rows(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scales: Tensor, offsets: Tensor, *, is_rough: bool
) -> Tensor:
    """Return the rows of `a` (M, D) times the `b` (E, O, D) of their expert: (M, O), bf16."""
    if a.device.type == "cpu":
        experts = zip(torch.split(a, _sizes(offsets)), b, b_scales, strict=True)
        made = [multiply(x, w, a_scale, scale, torch.bfloat16, is_rough=is_rough) for x, w, scale in experts]
        return torch.cat(made)
    by_row = a_scale.expand(len(a)).contiguous()  # (M,)
    by_column = b_scales[:, None].expand(b.shape[:2]).contiguous()  # (E, O)
    return _multiply_groups(a, b.transpose(1, 2), by_row, by_column, offsets, is_rough=is_rough)


def _multiply_columns(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    """Return each expert's columns of `a` (O, M) times the same of `b` (D, M), turned: (E, O, D), bf16."""
    if a.device.type == "cpu":
        experts = zip(*(torch.split(x, _sizes(offsets), dim=1) for x in (a, b)), strict=True)
        pairs = [(x.contiguous(), y.contiguous()) for x, y in experts]
        return torch.stack([multiply(x, y, a_scale, b_scale, torch.bfloat16, is_rough=False) for x, y in pairs])
    by_row = a_scale.expand(len(offsets) * len(a)).contiguous()  # (E * O,)
    by_column = b_scale.expand(len(offsets) * len(b)).contiguous()  # (E * D,)
    return _multiply_groups(a, b.T, by_row, by_column, offsets, is_rough=False)


def _multiply_groups(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, offsets: Tensor, *, is_rough: bool
) -> Tensor:
    """Return the product of each group that `offsets` end, by a kernel that knows scales by row and column only."""
    product: Tensor = torch._scaled_grouped_mm(
        a, b, a_scales, b_scales, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=is_rough
    )
    return product


def _sizes(offsets: Tensor) -> list[int]:
    """Return the groups' sizes."""
    return list(offsets.diff(prepend=offsets.new_zeros(1)).tolist())
