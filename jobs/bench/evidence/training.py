"""A bare loop with the numerics of the train stage: bf16 weights, fp32 masters in AdamW, fp32 router biases."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.bench.evidence.corpus import all_rows, random_rows
from ray_ds.config.optimizer import Schedule
from ray_ds.errors import ConfigError
from ray_ds.model import Decoder, expert_load, reset_expert_load, update_router_bias
from ray_ds.train.schedule import lr_factor

ESTIMATE_AFTER = 20
"""Steps after which the time of the rest is told."""
VALIDATION_ROWS = 64

MicroBatch = tuple[Tensor, Tensor]
"""Tokens and targets, (rows, seq_len) each."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    steps: int
    rows: int
    """Of a step."""
    seq_len: int
    lr: float = 1e-3
    final_lr_fraction: float = 0.1
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    """Of matrices."""
    clipping: float = 1.0
    router_bias_speed: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse a run that ends before its warm-up does."""
        if self.steps <= self.warmup_steps:
            raise ConfigError("steps", self.steps, f"must be above the warm-up's {self.warmup_steps}", "raise it")

    @property
    def schedule(self) -> Schedule:
        """The rate's way over the steps."""
        return Schedule(warmup_steps=self.warmup_steps, final_lr_fraction=self.final_lr_fraction)


class Trainer:
    """A decoder in training."""

    def __init__(self, decoder: Decoder, recipe: Recipe, device: torch.device) -> None:
        """Move a decoder with its first weights, fp32 on the CPU, to a device and into bf16."""
        self.recipe = recipe
        masters = [parameter.detach().to(device, copy=True) for parameter in decoder.parameters()]
        self.decoder = decoder.to(device, torch.bfloat16)
        self._weights: list[Tensor] = list(decoder.parameters())
        self._masters = masters
        matrices, vectors = ([m for m in masters if (m.dim() >= 2) is is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=device.type == "cuda")
        self._num_steps = 0
        self.load = expert_load(decoder)
        """How many tokens of the last step chose each expert, (MoE layers, E)."""

    def step(self, shares: Sequence[Sequence[MicroBatch]]) -> Tensor:
        """Take an optimizer step and return the mean loss over all targets, detached; nothing waits for the device.

        Args:
            shares: a step's micro-batches as they are dealt out to workers. Each worker adds up its gradients in bf16,
                and then the workers' sums are added up in bf16, first worker first.
        """
        count = sum(int(targets.numel()) for share in shares for _, targets in share)
        loss = torch.zeros((), device=self._weights[0].device)
        sums: list[Tensor] | None = None
        for share in shares:
            for tokens, targets in share:
                part = self.decoder(tokens, targets) / count
                part.backward()
                loss += part.detach()
            gradients = [weight.grad for weight in self._weights if weight.grad is not None]
            sums = gradients if sums is None else list(torch._foreach_add(sums, gradients))
            self.decoder.zero_grad()
        assert sums is not None and len(sums) == len(self._masters), "a weight got no gradient"
        self._update([gradient.float() for gradient in sums])
        return loss

    def _update(self, gradients: list[Tensor]) -> None:
        """Move masters, weights and router biases."""
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._masters, self.recipe.clipping)
        factor = lr_factor(self._num_steps, self.recipe.steps, self.recipe.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.lr * factor
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        self.load = expert_load(self.decoder)
        if self.decoder.config.has_router_bias:
            update_router_bias(self.decoder, self.load, self.recipe.router_bias_speed)
            reset_expert_load(self.decoder)
        self._num_steps += 1


def train(
    trainer: Trainer, tokens: Tensor, *, seed: int, label: str, after_step: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Train through all steps of the recipe on random rows; return the loss of each step.

    Args:
        tokens: (N,), the text.
        label: shown with the estimate of the time.
        after_step: called with the number of steps done.
    """
    recipe, generator = trainer.recipe, torch.Generator().manual_seed(seed)
    trainer.decoder.train()
    losses, started = [], time.perf_counter()
    for step in range(1, recipe.steps + 1):
        losses.append(trainer.step([[random_rows(tokens, recipe.rows, recipe.seq_len, generator)]]))
        after_step(step)
        if step in (ESTIMATE_AFTER // 2, ESTIMATE_AFTER):
            losses[-1].item()  # wait for the device
            before, started = started, time.perf_counter()
            step_s = (started - before) / (ESTIMATE_AFTER // 2)
            if step == ESTIMATE_AFTER:
                rest_s = (recipe.steps - step) * step_s
                print(f"{label:32} {1000 * step_s:6.1f} ms a step, {rest_s:5.0f} s to go", flush=True)
    return list(torch.stack(losses).tolist())


@torch.no_grad()
def validation_nats(decoder: Decoder, tokens: Tensor, seq_len: int) -> float:
    """Return the cross-entropy of a whole text in rows of `seq_len`, in nats a character.

    It is what the mean over random rows, nanoGPT's estimate, comes to with more and more of them, but for edges.
    """
    was_training = decoder.training
    decoder.eval()
    rows = all_rows(tokens, seq_len)
    parts = torch.split(rows, VALIDATION_ROWS)
    total = torch.stack([decoder(part[:, :-1], part[:, 1:]) for part in parts]).sum()
    decoder.train(was_training)
    return float(total) / rows[:, 1:].numel()


@torch.no_grad()
def prediction_nats(decoder: Decoder, tokens: Tensor, seq_len: int) -> float:
    """Return the cross-entropy of the first module of multi-token prediction, in nats a character.

    It is given a row up to a place and the character behind it, and guesses the one behind that.
    """
    decoder.eval()
    total, count = 0.0, 0
    for part in torch.split(all_rows(tokens, seq_len + 1), VALIDATION_ROWS):
        logits, _ = decoder.draft(decoder.hidden(part[:, :-2]), part[:, 1:-1])
        goals = part[:, 2:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals, reduction="sum"))
        count += len(goals)
    decoder.train()
    return total / count
