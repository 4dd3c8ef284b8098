import pytest
import torch
import torch.nn.functional as F

from ray_ds.model import loss as loss_module
from ray_ds.model.loss import IGNORED_TARGET, OutputHead, linear_cross_entropy, summed_cross_entropy


@pytest.fixture(params=[1 << 20, 100], ids=["one chunk", "chunks of three rows"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_CHUNK", request.param)
    monkeypatch.setattr(loss_module, "LINEAR_CPU_ROWS", max(3, request.param // 33))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_the_stock_function_over_an_fp32_copy(dtype):
    logits = (torch.randn(20, 33) * 5).to(dtype)
    targets = torch.randint(33, (20,))
    targets[::4] = IGNORED_TARGET
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = summed_cross_entropy(ours, targets)
    wanted = F.cross_entropy(theirs.float(), targets, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    (loss * 3).backward()
    (wanted * 3).backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_is_that_of_small_steps():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, IGNORED_TARGET, 3])
    (grad,) = torch.autograd.grad(summed_cross_entropy(logits, targets), logits)
    step = 1e-2
    for row, column in [(0, 0), (1, 2), (2, 5), (3, 3)]:
        moved = [logits.detach().clone() for _ in range(2)]
        moved[0][row, column] -= step
        moved[1][row, column] += step
        low, high = (F.cross_entropy(m, targets, reduction="sum") for m in moved)
        torch.testing.assert_close(grad[row, column], (high - low) / (2 * step), rtol=1e-3, atol=1e-4)


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 1e4
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_nothing_to_predict_costs_nothing():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((2,), IGNORED_TARGET))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_hidden_states_is_that_of_their_logits(dtype):
    hidden, weight = (torch.randn(20, 12) * 2).to(dtype), torch.randn(33, 12).to(dtype)
    targets = torch.randint(33, (20,))
    targets[::4] = IGNORED_TARGET
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in (hidden, weight)] for _ in range(2))
    loss = linear_cross_entropy(*ours, targets)
    wanted = F.cross_entropy((theirs[0] @ theirs[1].T).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    (loss * 3).backward()
    (wanted * 3).backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for found, expected in zip(ours, theirs, strict=True):
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad, expected.grad, rtol=tolerance, atol=tolerance * 10)


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight = torch.randn(8, 12), torch.randn(33, 12)
    loss = linear_cross_entropy(hidden, weight, torch.arange(8))
    assert not loss.requires_grad
    with torch.no_grad():
        again = linear_cross_entropy(hidden.requires_grad_(), weight, torch.arange(8))
    assert torch.equal(loss, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_of_the_head_gives_the_same(dtype):
    hidden, targets = torch.randn(2, 10, 12).to(dtype), torch.randint(33, (2, 10))
    weight = torch.randn(33, 12)
    losses = []
    for kernels in ("plain", "fast", "auto"):
        head = OutputHead(12, 33, kernels).to(dtype)
        head.weight.data.copy_(weight)
        losses.append(head(hidden, targets))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
