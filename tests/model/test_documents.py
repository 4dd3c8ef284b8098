import pytest
import torch

from ray_ds.model.decoder import LossWeights
from ray_ds.model.documents import document_block_mask, document_mask, document_positions, number_documents
from ray_ds.model.loss import IGNORED_TARGET
from tests.model.models import KINDS, batch, new_decoder

LENGTHS = (7, 1, 12)
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]


def test_documents_start_at_bos():
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6]])
    segments = number_documents(tokens, bos_token_id=0)
    assert segments.tolist() == [[0, 1, 1, 1, 2, 3, 3], [1] * 7]
    assert document_positions(segments).tolist() == [[0, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


def test_masks_of_both_kinds_allow_the_same():
    segments = torch.stack([SEGMENTS[0], torch.zeros(20, dtype=torch.int64)])
    mask = document_mask(segments)[:, 0]
    blocks = document_block_mask(segments)
    for row in range(2):
        for query in range(20):
            for key in range(20):
                wanted = key <= query and segments[row, key] == segments[row, query]
                places = (torch.tensor(place) for place in (row, 0, query, key))
                assert mask[row, query, key] == wanted == blocks.mask_mod(*places)


@pytest.mark.shows("Several documents in a row give what each gives alone")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_of_a_row_give_the_logits_of_each_alone(kind):
    decoder = new_decoder(KINDS[kind], scale=4).eval()
    tokens, _ = batch(KINDS[kind], rows=2)
    found = decoder(tokens, segments=SEGMENTS.expand(2, -1))
    alone = torch.cat([decoder(document) for document in tokens.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["latent", "grouped", "ahead"])
def test_documents_of_a_row_give_the_loss_and_gradients_of_each_alone(kind):
    config = KINDS[kind]
    weights = LossWeights(prediction=0.5)
    tokens, targets = batch(config, rows=1)
    together, apart = (new_decoder(config, weights=weights) for _ in range(2))
    together(tokens, targets, segments=SEGMENTS).backward()
    for document, goals in zip(tokens.split(LENGTHS, dim=1), targets.split(LENGTHS, dim=1), strict=True):
        apart(document, goals).backward()
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_numbers_of_documents_may_be_any():
    decoder = new_decoder(KINDS["latent"])
    tokens, targets = batch(KINDS["latent"], rows=1)
    targets[0, 3] = IGNORED_TARGET
    losses = [decoder(tokens, targets, segments=numbers).item() for numbers in (SEGMENTS, 40 - 9 * SEGMENTS)]
    assert losses[0] == losses[1] != decoder(tokens, targets).item()
