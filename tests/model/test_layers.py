import pytest
import torch
import torch.nn.functional as F

from ray_ds.model.layers import MLP, Embedding, RMSNorm


def test_rms_norm_is_the_stock_function_in_fp32():
    norm = RMSNorm(32)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 7, 32) * 30
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), norm.weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_squares_in_fp32(dtype):
    x = torch.full((1, 64), 1000.0, dtype=dtype)  # its square is infinite in fp16
    out = RMSNorm(64).to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.ones_like(x))


def test_mlp_is_a_gated_silu():
    mlp = MLP(8, 16)
    x = torch.randn(3, 8)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)


def test_an_embedding_starts_like_the_stock_one_and_draws_nothing_without_memory():
    torch.manual_seed(0)
    stock = torch.nn.Embedding(10, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(Embedding(10, 4).weight, stock.weight, rtol=0, atol=0)
    assert Embedding(10, 4, device="meta").weight.is_meta
