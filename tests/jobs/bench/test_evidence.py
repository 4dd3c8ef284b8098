"""The evidence bench: that every case runs through, and that what it measures with is right."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.bench.evidence.__main__ import CASES, main
from jobs.bench.evidence.corpus import all_rows, bigram_nats, random_rows, read_corpus, unigram_nats
from jobs.bench.evidence.shakespeare import drop_outputs
from jobs.bench.evidence.training import Recipe, Trainer, prediction_nats, validation_nats
from jobs.bench.evidence.world_sizes import deal_out
from ray_ds.errors import ConfigError, InputError
from ray_ds.model import Decoder, init_weights
from tests.model.models import AHEAD, DENSE, GROUPED, batch

CPU = torch.device("cpu")
TEXT = "Before we proceed any further, hear me speak. Speak, speak. You are all resolved rather to die?\n" * 12
RECIPE = Recipe(steps=3, rows=2, seq_len=8, warmup_steps=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run these small products on one thread, which is faster than sharing them out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("case", CASES)
def test_every_case_runs_through_and_keeps_what_it_found(case: str, text: Path, tmp_path: Path) -> None:
    assert main([case, "--small", "--corpus", str(text), "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / f"out/evidence_{case}.json").read_text(), parse_constant=pytest.fail)
    assert report["name"] == f"evidence_{case}" and report["inputs"]["small"] is True
    assert report["figures"] and all(isinstance(holds, bool) for holds in report["claims"].values())


def test_the_text_is_numbered_and_split_as_in_nanogpt(text: Path, tmp_path: Path) -> None:
    corpus = read_corpus(text, CPU)
    characters = sorted(set(TEXT))
    found = "".join(characters[number] for number in torch.cat((corpus.train, corpus.validation)).tolist())
    assert found == TEXT and corpus.vocab_size == len(characters)
    assert len(corpus.train) == int(0.9 * len(TEXT))
    rows = tmp_path / "books.jsonl"
    rows.write_text("".join(json.dumps({"id": name, "text": TEXT}) + "\n" for name in ("moby", "tinyshakespeare")))
    assert read_corpus(rows, CPU).sha256 == corpus.sha256
    rows.write_text(json.dumps({"id": "moby", "text": TEXT}) + "\n")
    with pytest.raises(InputError, match="must have a row with id tinyshakespeare; name another file"):
        read_corpus(rows, CPU)


def test_rows_are_of_the_text_and_targets_follow() -> None:
    tokens = torch.arange(50)
    found, targets = random_rows(tokens, 200, 8, torch.Generator().manual_seed(0))
    assert torch.equal(targets, found + 1) and torch.equal(found[:, 1:], targets[:, :-1])
    assert found.min() == 0 and targets.max() == 49, "both ends are reached"
    assert all_rows(tokens, 8).tolist() == [list(range(start, start + 9)) for start in range(0, 41, 8)]


def test_bounds_are_those_of_counted_characters(text: Path) -> None:
    corpus = read_corpus(text, CPU)
    train, validation, size = corpus.train.tolist(), corpus.validation.tolist(), corpus.vocab_size
    singles, pairs = Counter(train), Counter(itertools.pairwise(train))
    firsts = Counter(train[:-1])
    unigram = [-math.log((singles[c] + 1) / (len(train) + size)) for c in validation]
    bigram = [-math.log((pairs[p] + 1) / (firsts[p[0]] + size)) for p in itertools.pairwise(validation)]
    assert unigram_nats(corpus) == pytest.approx(sum(unigram) / len(unigram))
    assert bigram_nats(corpus) == pytest.approx(sum(bigram) / len(bigram))


def test_a_step_is_adamws_on_fp32_masters() -> None:
    decoder, reference = Decoder(DENSE), Decoder(DENSE)
    for model in (decoder, reference):
        init_weights(model, seed=0)
    masters = [parameter.detach().clone() for parameter in reference.parameters()]
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": RECIPE.weight_decay},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr, betas=RECIPE.betas)
    reference.bfloat16()
    trainer = Trainer(decoder, RECIPE, CPU)
    tokens, targets = batch(DENSE)
    for _ in range(2):
        loss = trainer.step([[(tokens, targets)]])
        wanted = reference(tokens, targets) / targets.numel()
        wanted.backward()
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, RECIPE.clipping)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.lr * 0.55  # halfway down the cosine from 1 to 0.1
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            parameter.data.copy_(master)
        assert loss.item() == wanted.item()
    for found, expected in zip(decoder.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_shares_are_runs_of_neighbours_and_give_the_step_of_the_whole_grid() -> None:
    assert deal_out(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]  # type: ignore[arg-type]
    tokens, targets = batch(DENSE, rows=4)
    grid = list(zip(tokens.split(1), targets.split(1), strict=True))
    losses = []
    for shares in ([grid], deal_out(grid, 3), [[(tokens, targets)]]):
        decoder = Decoder(DENSE)
        init_weights(decoder, seed=0)
        trainer = Trainer(decoder, RECIPE, CPU)
        losses.append([trainer.step(shares).item() for _ in range(3)])
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=5e-3)


def test_validation_is_the_mean_over_a_text_in_whole_rows() -> None:
    decoder = Decoder(AHEAD)
    init_weights(decoder, seed=0)
    tokens = torch.randint(AHEAD.vocab_size, (42,))
    rows = torch.stack([tokens[start : start + 9] for start in range(0, 33, 8)])
    logits = decoder.eval()(rows[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert validation_nats(decoder, tokens, 8) == pytest.approx(wanted.item(), rel=1e-5)
    rows = torch.stack([tokens[start : start + 10] for start in range(0, 32, 9)])
    guesses, _ = decoder.draft(decoder.hidden(rows[:, :8]), rows[:, 1:9])
    wanted = torch.nn.functional.cross_entropy(guesses.flatten(0, 1), rows[:, 2:].flatten())
    assert prediction_nats(decoder, tokens, 8) == pytest.approx(wanted.item(), rel=1e-5)


def test_dropout_is_in_training_only() -> None:
    decoder = Decoder(GROUPED)
    init_weights(decoder, seed=0)
    tokens, targets = batch(GROUPED)
    exact = decoder.eval()(tokens)
    drop_outputs(decoder, 0.25)
    assert torch.equal(decoder(tokens), exact)
    embedded = decoder.train().model.embed_tokens(tokens)
    assert (embedded == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(decoder(tokens, targets), decoder(tokens, targets))


def test_a_run_shorter_than_its_warm_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps \(50\) must be above the warm-up's 100; raise it"):
        Recipe(steps=50, rows=1, seq_len=8)
