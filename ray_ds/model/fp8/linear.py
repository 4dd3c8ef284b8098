"""Linear layers whose products are in FP8, each operand with one scale."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.model.fp8.numbers import ALIGNMENT, FINE, WIDE, multiply, quantize


class Fp8Linear(nn.Linear):
    """A linear layer whose three products, of its output and of both gradients, are in FP8.

    Activations and weights are E4M3, gradients E5M2.
    """

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
    """`x @ weight.T`. What is kept for the way back is in FP8 too, half of what a bf16 layer keeps."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """Return (N, O) for `x` (N, D) and `weight` (O, D)."""
        x8, x_scale = quantize(x, FINE)
        w8, w_scale = quantize(weight, FINE)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return multiply(x8, w8, x_scale, w_scale, x.dtype, is_rough=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` and `weight`."""
        x8, x_scale, w8, w_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        g8, g_scale = quantize(grad, WIDE)
        x_grad = multiply(g8, w8.T.contiguous(), g_scale, w_scale, grad.dtype, is_rough=False)  # (N, D)
        w_grad = multiply(g8.T.contiguous(), x8.T.contiguous(), g_scale, x_scale, grad.dtype, is_rough=False)  # (O, D)
        return x_grad, w_grad
