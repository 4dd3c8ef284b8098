"""A client that leaves: the engine does at most the step it is in."""

import dataclasses
import time
from collections.abc import Sequence

import httpx
import pytest

from ray_ds.serve.engine import Engine
from ray_ds.serve.http.service import CompletionService
from tests.serve.http.conftest import serving

STEP_S = 0.02


class Watched:
    """The engine, with a note of how many tokens it had sampled when it had been told to stop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens_at_cancel: int | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def cancel(self, answers: Sequence[object]) -> None:
        self._engine.cancel(answers)
        if self.tokens_at_cancel is None:
            self.tokens_at_cancel = self._engine.stats.num_tokens


@pytest.mark.shows("A client that leaves stops the work on its answer within one step")
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_stops_the_work_within_a_step(service: CompletionService, engine, model, api_key, stream) -> None:
    write = model.write

    def slowly(blocks, starts, tokens):
        time.sleep(STEP_S)
        return write(blocks, starts, tokens)

    model.write = slowly
    watched = Watched(engine)
    body = {"prompt": ["a", "b"], "max_tokens": 200, "stream": stream}
    headers = {"Authorization": f"Bearer {api_key}"}
    with serving(dataclasses.replace(service, engine=watched)) as url:
        timeout = httpx.Timeout(10, read=10 if stream else 0.3)
        with (
            httpx.Client(timeout=timeout, headers=headers) as client,
            pytest.raises(httpx.ReadTimeout),
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            next(response.iter_raw())
            raise httpx.ReadTimeout("the client loses patience with a stream")
        deadline = time.monotonic() + 5
        while engine.stats.num_running + engine.stats.num_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(3 * STEP_S)
        assert watched.tokens_at_cancel is not None
        assert engine.stats.num_tokens - watched.tokens_at_cancel <= len(body["prompt"]), "more than one step"
        assert engine.stats.num_tokens < 100
