"""The model on a CUDA device: the grouped kernels, no waiting for the device, every type, compilation."""

import dataclasses

import pytest
import torch

from ray_ds.config.presets import PRESETS
from ray_ds.model.caches import SlotCache
from ray_ds.model.decoder import Decoder, LossWeights
from ray_ds.model.experts import Experts
from ray_ds.model.fp8 import Fp8Experts, to_fp8
from ray_ds.model.fp8.experts import grouped_product
from ray_ds.model.initial import init_weights
from tests.model import models
from tests.model.models import KINDS

pytestmark = pytest.mark.gpu

CONFIG = dataclasses.replace(
    PRESETS["demo"], n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, q_lora_rank=64
)
FORMS = ("plain", "fast")
WEIGHTS = LossWeights(prediction=0.3, balance=0.01)


def new_decoder(dtype: torch.dtype) -> Decoder:
    decoder = Decoder(CONFIG)
    init_weights(decoder, seed=0)
    return decoder.to("cuda", dtype)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (4, 129), device="cuda")
    return tokens[:, :-1], tokens[:, 1:]


def test_grouped_kernels_compute_what_the_loop_does():
    experts = Experts(CONFIG).to("cuda", torch.bfloat16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rows = torch.randn(100, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([0, 7, 7, 30] + [60] * 8 + [99] + [100] * 3, device="cuda")
    leaves = (rows, *experts.parameters())
    results = []
    for run in (experts._run, experts._run_grouped):
        out = run(rows, ends)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=0.03, atol=0.03)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper has grouped products in FP8")


def test_grouped_products_in_fp8_are_those_of_the_cpu():
    needs_hopper()
    offsets = torch.tensor([16, 64, 80, 208, 224, 256], dtype=torch.int32)
    operands = (torch.randn(256, 128), torch.randn(6, 96, 128))
    grad = torch.randn(256, 96).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        rows, weights = (tensor.to(device, torch.bfloat16).requires_grad_() for tensor in operands)
        out = grouped_product(rows, weights, offsets.to(device))
        results.append([t.cpu().float() for t in (out, *torch.autograd.grad(out, (rows, weights), grad.to(device)))])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda - cpu).norm() < 5e-3 * cpu.norm()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_experts_in_fp8_never_wait_and_are_near_those_in_bf16(is_compiled):
    needs_hopper()
    config = dataclasses.replace(CONFIG, hidden_size=256, moe_intermediate_size=128)
    exact = Experts(config).to("cuda", torch.bfloat16)
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fp8 = Fp8Experts.of(exact)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.rand(300, 14, device="cuda").topk(4).indices  # the last two of 16 experts get no token
    shares, grad = torch.rand(300, 4, device="cuda"), torch.randn_like(x)
    leaves = (x, *exact.parameters())
    wanted = exact(x, shares, chosen)
    gradients = torch.autograd.grad(wanted, leaves, grad)
    layer = torch.compile(fp8, fullgraph=True) if is_compiled else fp8
    torch.autograd.grad(layer(x, shares, chosen), leaves, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = layer(x, shares, chosen)
        results = torch.autograd.grad(found, leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip((found, *results), (wanted, *gradients), strict=True):
        assert (ours - theirs).float().norm() < 6**0.5 * 2**-4 / 3**0.5 * theirs.float().norm()
    assert not results[1][-2:].any(), "an expert without tokens has a gradient of zero"


def test_a_model_of_linears_and_experts_in_fp8_compiles_to_one_graph():
    needs_hopper()
    decoder = new_decoder(torch.bfloat16)
    tokens, targets = batch()
    before = decoder(tokens, targets).item()
    layers = decoder.model.layers
    assert to_fp8(layers, torch.device("cuda")) > 0
    for layer in layers[1:]:
        layer.mlp.experts = Fp8Experts.of(layer.mlp.experts)
    loss = torch.compile(decoder, fullgraph=True)(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(before, rel=0.01)
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_a_training_pass_in_bf16_never_waits_for_the_device():
    decoder = new_decoder(torch.bfloat16)
    tokens, targets = batch()
    decoder(tokens, targets).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(tokens, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loss_and_gradients_are_those_of_the_cpu(dtype):
    decoder = new_decoder(dtype)
    tokens, targets = batch()
    loss = decoder(tokens, targets)
    loss.backward()
    reference = new_decoder(dtype).float().cpu()
    wanted = reference(tokens.cpu(), targets.cpu())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    found = torch.cat([parameter.grad.float().cpu().flatten() for parameter in decoder.parameters()])
    expected = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    tolerance = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}[dtype]
    assert (found - expected).norm() < tolerance * expected.norm()


def test_compiled_training_gives_the_eager_loss():
    decoder = new_decoder(torch.bfloat16)
    tokens, targets = batch()
    wanted = decoder(tokens, targets).item()
    compiled = torch.compile(decoder)
    loss = compiled(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-3)
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_documents_by_blocks_give_the_plain_loss_and_gradients(kind):
    config = dataclasses.replace(KINDS[kind], max_position_embeddings=512)
    tokens, targets = (torch.randint(config.vocab_size, (2, 300), device="cuda") for _ in range(2))
    segments = (torch.arange(300, device="cuda") // 77).expand(2, -1)
    plain, fast = (models.new_decoder(config, kernels=kernels).to("cuda", torch.bfloat16) for kernels in FORMS)
    losses = [decoder(tokens, targets, segments=segments) for decoder in (plain, fast)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for loss in losses:
        loss.backward()
    found, wanted = (torch.cat([p.grad.float().flatten() for p in decoder.parameters()]) for decoder in (fast, plain))
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_pass_compiles_to_one_graph_and_never_waits(kind):
    decoder = models.new_decoder(KINDS[kind], weights=WEIGHTS).to("cuda", torch.bfloat16)
    tokens, targets = (torch.randint(KINDS[kind].vocab_size, (4, 128), device="cuda") for _ in range(2))
    compiled = torch.compile(decoder, fullgraph=True)
    compiled(tokens, targets).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(tokens, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cached_decoding_gives_the_logits_of_a_whole_forward():
    decoder = new_decoder(torch.float32).eval().requires_grad_(False)
    tokens, _ = batch()
    cache = SlotCache(CONFIG, 4, 140, dtype=torch.float32, device="cuda")
    decoder(tokens[:, :100], cache=cache.rows([3, 2, 1, 0], [100] * 4))
    for step in range(100, 104):
        logits = decoder(tokens[:, step : step + 1], cache=cache.rows([3, 2, 1, 0], [1] * 4))
    torch.testing.assert_close(logits[:, 0], decoder(tokens[:, :104])[:, -1], rtol=1e-3, atol=1e-4)
