"""The OpenAPI document against the routes: whatever it allows is answered as it says, and never by a 5xx."""

import dataclasses
from collections.abc import Sequence

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from torch import Tensor

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import ROLE_TEMPLATE, ChatTemplate
from ray_ds.serve.http.app import GETS, POSTS, build_app
from ray_ds.serve.http.service import CompletionService
from tests.evaluate.tiny_tasks import tiny_tokenizer
from tests.serve.http.teacher import TeacherEngine

load_all_checks()
HEADERS = {"Authorization": "Bearer sk-test-0123456789"}
# That ids are the tokenizer's, prompts fit and fields go together is for no schema to say: such bodies get 400 or 413.
CHECKS = {
    "checks": {
        "positive_data_acceptance": {"expected-statuses": [200, 400, 404, 413]},
        "negative_data_rejection": {"expected-statuses": [400, 401, 404, 413]},
    }
}


@pytest.fixture
def schema(service: CompletionService) -> BaseSchema:
    tokenizer = tiny_tokenizer()

    def logits(sequence: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(sequence) * 7 % 300, tokenizer.vocab_size) * 9.0

    engine, chat = TeacherEngine(logits, tokenizer), ChatEncoder(ChatTemplate(ROLE_TEMPLATE), tokenizer)
    app = build_app(dataclasses.replace(service, engine=engine, tokenizer=tokenizer, chat=chat))
    return schemathesis.openapi.from_asgi(
        "/openapi.json", app, headers=HEADERS, config=SchemathesisConfig.from_dict(CHECKS)
    )


ROUTES = [(get.path.replace(":path", ""), "get") for get in GETS] + [(post.path, "post") for post in POSTS]


@pytest.mark.shows("Every route does what the OpenAPI document says, whatever it is sent")
@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    # A route without a body takes nothing that could be wrong.
    + [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[1] == "post"],
)
def test_every_route_does_what_its_document_says(schema: BaseSchema, path: str, method: str, mode) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        case.call_and_validate(headers=HEADERS)

    check()


def test_every_route_is_in_the_document(schema: BaseSchema) -> None:
    documented = {(path, method) for path, methods in schema.raw_schema["paths"].items() for method in methods}
    assert documented == set(ROUTES)
