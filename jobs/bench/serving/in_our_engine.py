"""Our engine with an INT8 model, without HTTP and without Ray."""

import atexit
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import torch

from jobs.bench.serving.work import Generate, Prompts, Work, run_as_program
from ray_ds.config.serve import ServeSettings
from ray_ds.config.settings import decode_settings
from ray_ds.serve.build import build_engine
from ray_ds.serve.engine import Engine
from ray_ds.serve.load import load_served_model
from ray_ds.serve.requests import Event, GenerationRequest, Piece, SamplingParams


class NoText:
    """A tokenizer's stand-in: every token is the same letter and none ends an answer."""

    stop_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """Return the letter."""
        return b"x"


def load(work: Work) -> Generate:
    """Return what answers with the model of an INT8 folder."""
    torch.set_num_threads(work.threads)
    settings = make_settings(work)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = load_served_model(Path(work.folder), is_quantized=True, device=torch.device(work.device), dtype=dtype)
    engine = build_engine(model.decoder, NoText(work.vocab_size), settings)
    engine.start()
    atexit.register(engine.close)  # its thread must not be in torch when the interpreter goes
    return generate_with(engine)


def make_settings(work: Work) -> ServeSettings:
    """Return the settings of a replica that has a place for every prompt."""
    raw = {
        "max_model_len": work.max_len,
        "max_running_requests": max(work.concurrency),
        "exactness": work.exactness,
        "precision": work.precision,
        "cpus_per_replica": work.threads,
        "gpus_per_replica": float(work.device == "cuda"),
    }
    return decode_settings(ServeSettings, raw, where="bench")


def generate_with(engine: Engine) -> Generate:
    """Return what hands all prompts to the engine and waits for the ends of their answers."""

    def generate(prompts: Prompts, num_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        requests = [GenerationRequest(prompt=tuple(prompt), params=params) for prompt in prompts]
        engine.submit([(request, _putter(events, place)) for place, request in enumerate(requests)])
        lengths = [0] * len(prompts)
        num_open = len(prompts)
        while num_open:
            place, event = events.get()
            if not isinstance(event, Piece):
                raise RuntimeError(f"the engine answered with {event}")
            lengths[place] += event.num_tokens
            num_open -= event.finish_reason is not None
        return lengths

    return generate


def _putter(events: "SimpleQueue[tuple[int, Event]]", place: int) -> Callable[[Event], None]:
    return lambda event: events.put((place, event))


if __name__ == "__main__":
    run_as_program(load)
