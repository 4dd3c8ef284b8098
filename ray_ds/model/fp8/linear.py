"""Linear layers whose products are in FP8, each row of an operand with a scale of its own.

A row's largest number is known where the row is made, so a compiler can quantize it in the same kernel; one scale for
all rows would take another pass over them. The gradient of the weight sums over rows, whose scales differ, and stays in
bf16, as it does in torchao's "rowwise_with_gw_hp": two of three products are in FP8, and its sum over many rows, where
small numbers count most, loses nothing.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.model.fp8.numbers import ALIGNMENT, FINE, multiply, quantize


class Fp8Linear(nn.Linear):
    """A linear layer whose products of its output and of the gradient of its input are in FP8, all E4M3."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        """Return one with the parameters, the same objects, of a linear layer."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for each vector of `input` (..., D), in its type; in evaluation in full precision."""
        if not self.training or input.shape[:-1].numel() % ALIGNMENT:
            return super().forward(input)
        rows = input.flatten(0, -2)  # (N, D)
        out: Tensor = _Product.apply(rows, self.weight.to(rows.dtype))  # type: ignore[no-untyped-call]
        out = torch.unflatten(out, 0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """`x @ weight.T`, computed in bf16 where not in FP8."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """Return (N, O) for `x` (N, D) and `weight` (O, D)."""
        ctx.save_for_backward(x, weight)
        x8, x_scales = quantize(x, FINE, dims=(1,))
        w8, w_scales = quantize(weight, FINE, dims=(1,))
        return multiply(x8, w8, x_scales[:, None], w_scales[None], torch.bfloat16, is_rough=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` and `weight`."""
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        g8, g_scales = quantize(grad, FINE, dims=(1,))
        w8, w_scales = quantize(weight.T, FINE, dims=(1,))  # (D, O), (D,)
        x_grad = multiply(g8, w8.contiguous(), g_scales[:, None], w_scales[None], torch.bfloat16, is_rough=False)
        return x_grad.to(grad.dtype), grad.T @ x  # (N, D), (O, D)
