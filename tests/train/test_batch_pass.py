"""The random numbers of a micro-batch, by its place in the data."""

import pytest
import torch

from ray_ds.errors import ConfigError
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.train.batch_pass import seed_micro_batch
from tests.train.runs import VOCAB_SIZE, make_settings

LARGEST = 2**63 - 1


def drawn(seed: int, cursor: int, index: int) -> list[float]:
    seed_micro_batch(seed, cursor, index)
    numbers: list[float] = torch.rand(4).tolist()
    return numbers


def test_numbers_are_those_of_the_place() -> None:
    found = drawn(7, 5, 3)
    torch.manual_seed((7 * 1_000_003 + 5) * 65_537 + 3)
    assert found == torch.rand(4).tolist()
    places = [(7, 5, 3), (7, 5, 4), (7, 6, 3), (8, 5, 3)]
    assert len({tuple(drawn(*place)) for place in places}) == len(places)


@pytest.mark.parametrize("seed", [300_000_000, LARGEST])
def test_any_seed_draws(seed: int) -> None:
    settings = make_settings(seed=seed)
    assert drawn(settings.seed, 10**9, 10**4) != drawn(settings.seed, 10**9 + 1, 10**4)
    init_weights(Decoder(settings.model.resolve(VOCAB_SIZE, settings.seq_len)), settings.seed)


@pytest.mark.parametrize("seed", [-1, LARGEST + 1])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.seed \({seed}\)"):
        make_settings(seed=seed)
