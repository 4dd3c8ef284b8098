"""lm_eval's `local-completions` over HTTP against log-likelihoods in process, of the same weights."""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import httpx
import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI
from torch import Tensor

from ray_ds.evaluate.continuations import Key, encode_choices
from ray_ds.evaluate.lm_eval_model import LmEvalAnswers
from ray_ds.evaluate.tasks import Batch, Result, run_batch
from ray_ds.serve.http.service import CompletionService
from tests.evaluate.tiny_tasks import MAX_LEN, tiny_decoder, tiny_tokenizer
from tests.serve.http.conftest import serving
from tests.serve.http.teacher import TeacherEngine

CONTEXTS = ["Question: the sky? Answer:", "blue sky", "the colour of"]
CONTINUATIONS = [" yes", " maybe blue", "中 no"]
TOKENIZER = tiny_tokenizer()
DECODER = tiny_decoder(TOKENIZER)


@torch.inference_mode()
def logits(sequence: Sequence[int]) -> Tensor:
    return DECODER(torch.tensor([sequence]))[0, :, : TOKENIZER.vocab_size]


@pytest.fixture
def url(service: CompletionService) -> Iterator[str]:
    engine = TeacherEngine(logits, TOKENIZER)
    with serving(dataclasses.replace(service, engine=engine, tokenizer=TOKENIZER)) as url:
        yield url


@pytest.mark.shows("lm_eval's log-likelihoods through HTTP are those of the model in process, to 1e-4")
def test_loglikelihoods_through_http_are_those_in_process(url: str, api_key: str) -> None:
    def run_batches(batches: Sequence[Batch]) -> dict[Key, Result]:
        return {key: own for batch in batches for key, own in run_batch(DECODER, TOKENIZER, batch).items()}

    asked = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    expected = LmEvalAnswers(run_batches, TOKENIZER, seq_len=MAX_LEN, micro_batch=4).loglikelihood(asked)
    encoded = [encode_choices(TOKENIZER, context, [continuation])[0] for context, continuation in asked]
    found = []
    # Eight prompts at a time, as with lm_eval's batch_size=8.
    for batch in (encoded[:8], encoded[8:]):
        messages = [list(own.tokens) for own in batch]
        payload = LocalCompletionsAPI._create_payload(SimpleNamespace(model="team/tiny"), messages, generate=False)
        headers = {"Authorization": f"Bearer {api_key}"}
        outputs = httpx.post(f"{url}/v1/completions", json=payload, headers=headers, timeout=60).json()
        found += LocalCompletionsAPI.parse_logprobs(outputs, messages, [own.start for own in batch])
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
