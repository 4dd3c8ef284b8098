"""Products of linear layers in FP8: operands quantized a tensor at a time as they come, sums in fp32.

Activations and weights are E4M3, whose numbers are finer, gradients E5M2, whose numbers reach further (arXiv
2209.05433). As in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1) embedding, output projection, router, norms and the
products of attention itself stay in higher precision, and so do master weights and optimizer.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

FINE = torch.float8_e4m3fn
WIDE = torch.float8_e5m2
ALIGNMENT = 16
"""Both widths of a weight, and the rows, must be a multiple: the kernels move 16 bytes at a time."""


class Fp8Linear(nn.Linear):
    """A linear layer whose three products, of its output and of both gradients, are in FP8."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for each vector of `input` (..., D), in its type; in evaluation in full precision."""
        if not self.training or input.shape[:-1].numel() % ALIGNMENT:
            return super().forward(input)
        rows = input.flatten(0, -2)  # (N, D)
        out: Tensor = _Product.apply(rows, self.weight.to(rows.dtype))  # type: ignore[no-untyped-call]
        out = torch.unflatten(out, 0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


def to_fp8(module: nn.Module) -> int:
    """Put `Fp8Linear` in the place of each linear layer below `module` whose widths allow it; return how many.

    Parameters stay the same objects under the same names.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not (child.in_features % ALIGNMENT or child.out_features % ALIGNMENT):
                setattr(parent, name, _replace(child))
                count += 1
    return count


def _replace(linear: nn.Linear) -> Fp8Linear:
    """Return an `Fp8Linear` with the parameters of a linear layer."""
    with torch.device("meta"):
        layer = Fp8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x` in FP8 and the fp32 scalar that it has to be multiplied by: its largest number is the type's."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


class _Product(torch.autograd.Function):
    """`x @ weight.T`. What is kept for the way back is in FP8 too, half of what a bf16 layer keeps."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """Return (N, O) for `x` (N, D) and `weight` (O, D)."""
        x8, x_scale = quantize(x, FINE)
        w8, w_scale = quantize(weight, FINE)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return _multiply(x8, w8, x_scale, w_scale, x.dtype, is_rough=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` and `weight`."""
        x8, x_scale, w8, w_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        g8, g_scale = quantize(grad, WIDE)
        x_grad = _multiply(g8, w8.T.contiguous(), g_scale, w_scale, grad.dtype, is_rough=False)  # (N, D)
        w_grad = _multiply(g8.T.contiguous(), x8.T.contiguous(), g_scale, x_scale, grad.dtype, is_rough=False)  # (O, D)
        return x_grad, w_grad


def _multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, is_rough: bool) -> Tensor:
    """Return `a @ b.T` in `dtype`; both lie row by row, as the tensor cores want them.

    Args:
        is_rough: sum in the tensor cores' 14 bits, which is faster and enough for the way forth.
    """
    product: Tensor = torch._scaled_mm(
        a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=is_rough
    )
    return product
