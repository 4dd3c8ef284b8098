import pytest
import torch

from ray_ds.model.decoder import LossWeights
from tests.model.models import KINDS, batch, new_decoder

WEIGHTS = LossWeights(prediction=0.3, balance=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_fast_forms_give_the_plain_loss_and_gradients(kind):
    tokens, targets = batch(KINDS[kind])
    plain, fast = (new_decoder(KINDS[kind], weights=WEIGHTS, kernels=kernels) for kernels in ("plain", "fast"))
    losses = [decoder(tokens, targets) for decoder in (plain, fast)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-4)
    for loss in losses:
        loss.backward()
    for (name, found), wanted in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.shows("The fast training pass, loss included, compiles to one graph")
@pytest.mark.parametrize(("kind", "recomputes"), [("grouped", False), ("v2", False), ("ahead", True)])
def test_the_fast_training_pass_is_one_graph(kind, recomputes):
    decoder = new_decoder(KINDS[kind], weights=WEIGHTS, kernels="fast", recompute_activations=recomputes).bfloat16()
    tokens, targets = batch(KINDS[kind])
    wanted = decoder(tokens, targets)
    torch._dynamo.reset()
    loss = torch.compile(decoder, fullgraph=True, backend="eager")(tokens, targets)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@torch.no_grad()
def test_documents_are_part_of_the_one_graph():
    tokens, targets = batch(KINDS["latent"], rows=2)
    segments = torch.arange(20).expand(2, -1) // 7
    decoder, plain = (new_decoder(KINDS["latent"], kernels=kernels).bfloat16() for kernels in ("fast", "plain"))
    torch._dynamo.reset()
    loss = torch.compile(decoder, fullgraph=True, backend="eager")(tokens, targets, segments=segments)
    torch.testing.assert_close(loss, plain(tokens, targets, segments=segments), rtol=1e-3, atol=0)
