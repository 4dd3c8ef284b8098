"""Data: the real stages clean and tokenize a small text to the same bytes with one CPU and with all of them."""

import time

from pydantic import JsonValue

from ray_ds.artifacts import Artifact
from ray_ds.config.clean import CleanSettings, InputFiles
from ray_ds.config.tokenize import TokenizeSettings
from ray_ds.config.tokenizer import TokenizerSettings
from ray_ds.stages.clean import clean
from ray_ds.stages.tokenize import tokenize
from ray_ds.stages.tokenizer import train_tokenizer
from ray_ds.verify.context import Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.made_up import VOCAB_SIZE, make_run, write_text

NAME = "data"
UNIT_BYTES = 32_768
"""Small, so that there are more work units than CPUs in most clusters."""


def check_data(context: Context) -> Finding:
    """Clean and tokenize twice, one work unit at a time and as many as there are CPUs."""
    num_documents = write_text(context.work(NAME, "text"))
    started = time.monotonic()
    one = _run_stages(context, "one_cpu", max_running=1)
    one_s = time.monotonic() - started
    started = time.monotonic()
    every = _run_stages(context, "all_cpus", max_running=None)
    every_s = time.monotonic() - started
    figures: dict[str, JsonValue] = {
        "documents": num_documents,
        "documents_kept": one[0].fact("documents", "kept"),
        "one_cpu_s": one_s,
        "all_cpus_s": every_s,
        "content": {artifact.kind: artifact.content_sha256[:16] for artifact in one},
    }
    return judged(NAME, figures, judge_same(one, every))


def _run_stages(context: Context, name: str, *, max_running: int | None) -> list[Artifact]:
    """Return the Corpus, Tokenizer and TokenShards of the made-up text."""
    folder = context.work(NAME, name)
    files = InputFiles(glob=context.work(NAME, "text", "*.jsonl"), id_column="id", source="verify", licence="various")
    cleaning = CleanSettings(inputs=(files,), unit_bytes=UNIT_BYTES, max_running_units=max_running)
    learning = TokenizerSettings(vocab_size=VOCAB_SIZE)
    cutting = TokenizeSettings(validation_fraction=0.2, max_running_units=max_running)
    corpus = clean(cleaning, make_run(folder, "clean", cleaning, run_dir=context.run_dir))
    tokenizer = train_tokenizer(learning, make_run(folder, "tokenizer", learning, [corpus], run_dir=context.run_dir))
    inputs = [corpus, tokenizer]
    shards = tokenize(cutting, make_run(folder, "tokenize", cutting, inputs, run_dir=context.run_dir))
    return [corpus, tokenizer, shards]


def judge_same(one: list[Artifact], every: list[Artifact]) -> list[Problem]:
    """Return the artefacts whose bytes depend on how many CPUs made them."""
    problems = []
    for first, second in zip(one, every, strict=True):
        if first.content_sha256 == second.content_sha256:
            continue
        hashes = {info.path: info.sha256 for info in first.manifest.files}
        differing = [info.path for info in second.manifest.files if hashes.get(info.path) != info.sha256]
        wrong = f"the {first.kind} made on one CPU and on all of them differ: {', '.join(differing) or 'files missing'}"
        action = "see that versions agree on all nodes; then test the nodes' memory and the storage"
        problems.append(Problem(wrong=wrong, action=action))
    return problems
