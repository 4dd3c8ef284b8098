import pytest
import torch

from ray_ds.model.attention import attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_both_forms_agree(dtype, masked, shared):
    q = torch.randn(2, 6, 30, 24).to(dtype).requires_grad_()
    k = torch.randn(2, 6 // shared, 30, 24).to(dtype).requires_grad_()
    v = torch.randn(2, 6 // shared, 30, 16).to(dtype).requires_grad_()
    mask = (torch.rand(2, 1, 30, 30) < 0.5).tril() | torch.eye(30, dtype=torch.bool) if masked else None
    results = []
    for kernels in ("plain", "fast"):
        out = attend(q, k, v, 0.2, mask, kernels)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
