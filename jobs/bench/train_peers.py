"""The peers of the training bench: scripts for one process that train the same model without Ray.

Each runs in a process of its own and gives its tokens/s. They read no text: a step's rows lie ready on the device.
"""

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from ray_ds.config.model_size import flops_per_token
from ray_ds.config.train import Precision, TrainSettings
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.train.metrics import peak_flops
from ray_ds.train.objective import MicroBatch, NextTokenObjective

WARM_UP = 0.4
"""Part of the steps that is left out of the figures: compilation, and fp16 finding its loss scale."""

Peer = Callable[[TrainSettings, argparse.Namespace], float]


def run_peer(peer: Peer, settings: TrainSettings, options: argparse.Namespace) -> dict[str, float]:
    """Return a peer's tokens/s, measured in a process of its own that leaves no memory behind."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_run_peer, args=(peer, settings, options, results))
    process.start()
    figure: float = results.get()
    process.kill()  # NCCL may hang at the end of a process
    process.join()
    return {f"{peer.__name__}_tokens_per_s": figure}


def _run_peer(peer: Peer, settings: TrainSettings, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(options.threads)
    try:
        results.put(peer(settings, options))
    except BaseException:
        results.put(math.nan)
        raise


def rows_of_step(settings: TrainSettings, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Return a step's micro-batches, ready on the device."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(settings.num_micro_batches):
        rows = torch.randint(options.vocab_size, (settings.micro_batch, settings.seq_len + 1), generator=generator)
        made.append((rows[:, :-1].to(settings.device), rows[:, 1:].to(settings.device)))
    return made


def new_decoder(settings: TrainSettings, options: argparse.Namespace) -> Decoder:
    """Return the model with its first weights, on the device."""
    decoder = Decoder(settings.model.resolve(options.vocab_size, options.seq_len))
    init_weights(decoder, 0)
    return decoder.to(settings.device)


def time_steps(step: Callable[[], None], settings: TrainSettings, options: argparse.Namespace) -> float:
    """Return the tokens/s of the later steps, which need not wait for each other."""
    warm_up = int(options.steps * WARM_UP)
    for number in range(options.steps):
        if number == warm_up:
            _synchronize(settings.device)
            started = time.perf_counter()
        step()
    _synchronize(settings.device)
    return settings.batch_tokens * (options.steps - warm_up) / (time.perf_counter() - started)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bare_engine(settings: TrainSettings, options: argparse.Namespace) -> float:
    """Return tokens/s of our engine, `ray_ds.train.zero.Engine`, in a bare script: no Ray and none of our loop."""
    from ray_ds.train.zero.engine import Engine

    with process_group(settings.device):
        decoder = new_decoder(settings, options)
        engine = Engine(NextTokenObjective(decoder), settings, device=torch.device(settings.device), world_size=1)
        batches = [
            MicroBatch(tokens, targets, terms=targets.numel(), index=index)
            for index, (tokens, targets) in enumerate(rows_of_step(settings, options))
        ]

        def step() -> None:
            for batch in batches:
                engine.forward_backward(batch, terms=settings.batch_tokens)
            engine.step(1.0)

        return time_steps(step, settings, options)


def stock_deepspeed(settings: TrainSettings, options: argparse.Namespace) -> float:
    """Return tokens/s of DeepSpeed as it is, with the configuration and optimizer that our engine gives it."""
    import deepspeed

    from ray_ds.train.zero.build import use_built_op
    from ray_ds.train.zero.config import deepspeed_config
    from ray_ds.train.zero.optimizer import make_optimizer

    is_cuda = settings.device == "cuda"
    with process_group(settings.device):
        use_built_op()
        decoder = new_decoder(settings, options)
        optimizer = make_optimizer(decoder.named_parameters(), settings.optimizer, is_cuda=is_cuda)
        deepspeed.init_distributed(dist_init_required=False)
        engine, *_ = deepspeed.initialize(
            model=decoder,
            optimizer=optimizer,
            config=deepspeed_config(settings, 1, is_cuda=is_cuda),
            dist_init_required=False,
        )
        if settings.compile:
            engine.compile()
        rows = rows_of_step(settings, options)

        def step() -> None:
            for tokens, targets in rows:
                engine.backward(engine(tokens, targets) / settings.batch_tokens, scale_wrt_gas=False)
                engine.step()

        return time_steps(step, settings, options)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Give this process a group of its own, as DeepSpeed wants one; it ends with the process."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.NamedTemporaryFile() as store:
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{store.name}", rank=0, world_size=1)
        yield


def time_plain_loop(
    model: torch.nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    settings: TrainSettings,
    options: argparse.Namespace,
) -> float:
    """Return tokens/s of a model trained in bf16 with fp32 masters and torch's AdamW, in as few kernels as torch has.

    Faster than autocast, in which what is not a product runs in fp32.

    Args:
        loss_of: from tokens and targets to the model's summed loss; compiled if the options say so.
    """
    weights = list(model.parameters())
    masters = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    forward = torch.compile(loss_of) if options.compile else loss_of
    optimizer = torch.optim.AdamW(masters, lr=options.lr, fused=settings.device == "cuda")
    rows = rows_of_step(settings, options)

    def step() -> None:
        for tokens, targets in rows:
            (forward(tokens, targets) / settings.batch_tokens).backward()
        update()

    @torch.no_grad()
    def update() -> None:
        wide = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(wide, [weight.grad for weight in weights])
        for master, gradient, weight in zip(masters, wide, weights, strict=True):
            master.grad, weight.grad = gradient, None
        torch.nn.utils.clip_grad_norm_(masters, settings.gradient_clipping)
        optimizer.step()
        torch._foreach_copy_(weights, masters)

    return time_steps(step, settings, options)


def bare_loop(settings: TrainSettings, options: argparse.Namespace) -> float:
    """Return tokens/s of the same model with fp32 masters and torch's AdamW: no Ray, no DeepSpeed."""
    decoder = new_decoder(settings, options)
    tokens_per_s = time_plain_loop(decoder, decoder, settings, options)
    peak = peak_flops(torch.device(settings.device), torch.bfloat16)
    if peak:
        config = settings.model.resolve(options.vocab_size, options.seq_len)
        work = tokens_per_s * flops_per_token(config, options.seq_len)
        print(f"bare loop: {tokens_per_s:,.0f} tokens/s, {work / peak:.1%} MFU", flush=True)
    return tokens_per_s


PEERS: Sequence[Peer] = (bare_engine, stock_deepspeed, bare_loop)
"""From the most of our own code to the least."""


def peers_of(precision: Precision) -> Sequence[Peer]:
    """Return the peers that train in a precision: the bare loop knows bf16 only."""
    return [peer for peer in PEERS if peer is not bare_loop or precision == "bf16"]
