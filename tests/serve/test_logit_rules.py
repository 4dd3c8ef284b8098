import pytest
import torch

from ray_ds.serve.logit_rules import apply_rules
from ray_ds.serve.requests import SamplingParams

PROMPT = (3, 3, 17, 5)
ANSWER = {5: 2, 9: 1, 17: 4}


def logits() -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(0)) * 4


def ruled(**params) -> torch.Tensor:
    banned = params.pop("banned", ())
    own = SamplingParams(max_tokens=9, **params)
    return apply_rules(logits(), own, prompt=PROMPT, counts=ANSWER, banned=banned)


def test_rules_that_change_nothing_copy_nothing() -> None:
    own = logits()
    assert apply_rules(own, SamplingParams(max_tokens=9), prompt=PROMPT, counts=ANSWER, banned=()) is own


def test_penalties_are_those_of_openais_definition() -> None:
    found = ruled(presence_penalty=0.7, frequency_penalty=-0.3)
    for token, value in enumerate(logits().tolist()):
        times = ANSWER.get(token, 0)
        assert float(found[token]) == pytest.approx(value - 0.7 * (times > 0) + 0.3 * times, abs=1e-5)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = torch.tensor([[*PROMPT, *(token for token, times in ANSWER.items() for _ in range(times))]])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits()[None])[0]
    torch.testing.assert_close(ruled(repetition_penalty=penalty), wanted, rtol=0, atol=1e-6)


def test_biases_are_those_of_transformers_and_come_before_penalties() -> None:
    from transformers import SequenceBiasLogitsProcessor

    bias = ((5, 2.5), (30, -100.0))
    wanted = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])(
        torch.tensor([[*PROMPT]]), logits()[None]
    )[0]
    torch.testing.assert_close(ruled(logit_bias=bias), wanted, rtol=0, atol=1e-6)
    doubled = torch.where(wanted[5] > 0, wanted[5] / 2, wanted[5] * 2)
    torch.testing.assert_close(ruled(logit_bias=bias, repetition_penalty=2.0)[5], doubled)


def test_banned_tokens_cannot_come_whatever_else_is_wanted() -> None:
    found = ruled(logit_bias=((7, 100.0),), banned={7, 8, 999})
    assert found[7] == found[8] == float("-inf")
    assert torch.isfinite(found).sum() == 38


def test_tokens_beyond_the_vocabulary_in_a_prompt_are_no_matter() -> None:
    own = SamplingParams(max_tokens=1, repetition_penalty=2.0)
    found = apply_rules(logits(), own, prompt=(500,), counts={}, banned=())
    assert torch.equal(found, logits())
