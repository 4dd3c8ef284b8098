import math
import random
from collections import Counter

import pytest
import torch

from ray_ds.serve.requests import SamplingParams
from ray_ds.serve.sampler import draw_tokens, token_logprobs

LOGITS = torch.tensor([math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)])


def reference_probabilities(params: SamplingParams) -> dict[int, float]:
    """Return what each token's share must be, by the definitions, one token at a time."""
    weights = {i: float(logit) / params.temperature for i, logit in enumerate(LOGITS)}
    total = sum(map(math.exp, weights.values()))
    ranked = sorted(((math.exp(w) / total, i) for i, w in weights.items()), reverse=True)[: params.top_k]
    mass = sum(p for p, _ in ranked)
    kept, seen = {}, 0.0
    for p, i in ranked:
        if seen < params.top_p * mass:
            kept[i] = p
        seen += p
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, None),
        (0.5, 1.0, None),
        (2.0, 1.0, 3),
        (1.0, 0.69, None),
        (1.0, 0.71, None),
        (1.0, 0.5, 2),
        (1, 1, 99),
    ],
)
def test_shares_are_those_of_the_definitions(temperature: float, top_p: float, top_k: int | None) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    num_draws = 4000
    draws = [(i + 0.5) / num_draws for i in range(num_draws)]
    drawn = Counter(draw_tokens(LOGITS.expand(num_draws, -1), [params] * num_draws, draws))
    expected = reference_probabilities(params)
    assert set(drawn) == set(expected)
    for token, share in expected.items():
        assert drawn[token] / num_draws == pytest.approx(share, abs=2 / num_draws)


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    generator = random.Random(0)
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=generator.choice([0.0, 0.7, 1.3]),
            top_p=generator.choice([1.0, 0.8]),
            top_k=generator.choice([None, 1, 7]),
        )
        for _ in range(32)
    ]
    draws = [generator.random() for _ in range(32)]
    together = draw_tokens(logits, params, draws)
    alone = [draw_tokens(logits[i : i + 1], params[i : i + 1], draws[i : i + 1])[0] for i in range(32)]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_no_temperature_and_almost_none_take_the_likeliest(temperature: float) -> None:
    params = [SamplingParams(max_tokens=1, temperature=temperature)]
    assert draw_tokens(LOGITS[None] * 1000, params, [0.999999]) == [1]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_are_tokens(draw: float) -> None:
    params = [SamplingParams(max_tokens=1, top_p=0.69)]
    assert draw_tokens(LOGITS[None], params, [draw])[0] in (1, 3)


def test_logprobs_are_those_of_the_untempered_distribution() -> None:
    logprob, top = token_logprobs(LOGITS + 7, token=4, num_top=2)
    assert logprob == pytest.approx(math.log(0.15), abs=1e-6)
    assert [token for token, _ in top] == [1, 3]
    assert [value for _, value in top] == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-6)


@pytest.mark.parametrize("min_p", [0.05, 0.3, 0.76, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_min_p_leaves_out_what_transformers_does(min_p: float, top_p: float) -> None:
    from transformers import MinPLogitsWarper, TopPLogitsWarper

    params = SamplingParams(max_tokens=1, temperature=0.9, top_p=top_p, min_p=min_p)
    scores = LOGITS[None] / params.temperature
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    shares = MinPLogitsWarper(min_p)(None, scores).softmax(dim=-1)[0]
    num_draws = 4000
    draws = [(i + 0.5) / num_draws for i in range(num_draws)]
    drawn = Counter(draw_tokens(LOGITS.expand(num_draws, -1), [params] * num_draws, draws))
    for token, share in enumerate(shares.tolist()):
        assert drawn[token] / num_draws == pytest.approx(share, abs=2 / num_draws)


def test_a_token_that_may_not_come_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[1] = float("-inf")
    rows = [SamplingParams(max_tokens=1, temperature=temperature) for temperature in (0.0, 0.01, 1.0, 100.0)]
    for draw in (0.0, 0.3, 0.999999):
        assert 1 not in draw_tokens(logits.expand(4, -1), rows, [draw] * 4)
