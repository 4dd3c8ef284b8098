"""The evaluate stage gives what one process computes, for both kinds of model, and refuses what does not fit."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ray_ds import storage
from ray_ds.artifacts import Artifact, EvalReport, TokenShards
from ray_ds.config.evaluate import EvaluateSettings
from ray_ds.config.model_settings import ModelSettings
from ray_ds.config.tokenizer import TokenizerSettings
from ray_ds.data.documents import file_names
from ray_ds.data.shards import TokenSplit
from ray_ds.data.tokenization import TokenizeJob, sum_counts, tokenize_file
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.evaluate.compression import conditional_bits_per_byte, xz_bytes
from ray_ds.evaluate.ngrams import bigram_nats, fit_bigram
from ray_ds.evaluate.perplexity import LossModel, Score, bits_per_byte, micro_batches, sum_loss
from ray_ds.evaluate.spans import Span, plan_spans
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.quantize import load_quantized, quantize_folder
from ray_ds.stages.evaluate import evaluate
from ray_ds.stages.tokenizer import learn
from ray_ds.tokenizer import train_bpe
from tests.stages.small_artifacts import book_texts, make_corpus, stage_run

TEXTS = book_texts(12, 6)
VOCAB_SIZE = 320
MAX_LEN = 64


def make_shards(folder: Path) -> TokenShards:
    corpus = make_corpus(folder, TEXTS)
    run = stage_run(folder, "TokenShards", corpus)
    facts = learn(TokenizerSettings(vocab_size=VOCAB_SIZE), corpus, "t", run.path("tokenizer.json"))
    job = TokenizeJob(
        step="tokenize",
        corpus_uri=corpus.uri,
        tokenizer_uri=run.path("tokenizer.json"),
        validation_fraction=0.3,
        hold_out="group",
        seed=0,
    )

    def publish(path: str, data: bytes) -> None:
        storage.write_bytes(run.path(path), data)

    counts = sum_counts(tokenize_file(name, publish, job) for name in file_names(corpus))
    shards = run.commit({"vocab_size": facts["vocab_size"], "tokenizer_digest": "t0", **counts}, seconds=0.0)
    assert isinstance(shards, TokenShards)
    return shards


def make_checkpoint(folder: Path, *, tokenizer_digest: str = "t0") -> Artifact:
    run = stage_run(folder, "Checkpoint", name=tokenizer_digest)
    config = ModelSettings(preset="tiny").resolve(VOCAB_SIZE, MAX_LEN)
    decoder = Decoder(config)
    init_weights(decoder, 0)
    target = Path(run.path("model"))
    save_checkpoint_folder(decoder.state_dict(), config, target, dtype=torch.float32, max_shard_bytes=1 << 30)
    (target / "tokenizer.json").write_text(train_bpe([], 263).to_json())
    return run.commit({"tokenizer_digest": tokenizer_digest}, seconds=0.0)


def make_quantized(folder: Path, checkpoint: Artifact) -> Artifact:
    run = stage_run(folder, "QuantizedModel", checkpoint)
    quantize_folder(Path(checkpoint.path("model")), Path(run.path("model")), max_shard_bytes=1 << 30)
    return run.commit({"tokenizer_digest": "t0"}, seconds=0.0)


def score(model: LossModel, split: TokenSplit, spans: Sequence[Span], num_bytes: int, *, micro_batch: int) -> Score:
    """Return what spans of a split cost a model in this process."""
    nats = math.fsum(sum_loss(model, split, batch) for batch in micro_batches(spans, micro_batch))
    return Score(nats=nats, tokens=sum(span.num_targets for span in spans), bytes=num_bytes)


@pytest.mark.ray
@pytest.mark.slow
def test_report_is_what_one_process_computes(tmp_path: Path, local_ray: str) -> None:
    checkpoint, shards = make_checkpoint(tmp_path), make_shards(tmp_path)
    settings = EvaluateSettings(seq_len=32, precision="fp32", micro_batch=3, num_workers=2)
    report = evaluate(settings, stage_run(tmp_path, "EvalReport", checkpoint, shards))
    assert isinstance(report, EvalReport) and report.fact("model_kind") == "Checkpoint"

    decoder = load_checkpoint_folder(Path(checkpoint.path("model")), dtype=torch.float32, device="cpu")
    train, validation = (TokenSplit.open(shards.uri, "train"), TokenSplit.open(shards.uri, "validation"))
    spans = plan_spans(validation, 32)
    num_bytes = shards.fact("bytes", "validation")
    expected = score(decoder, validation, spans, num_bytes, micro_batch=3)
    assert report.fact("tokens") == shards.fact("tokens", "validation") - validation.num_shards
    assert report.fact("bytes") == num_bytes
    assert report.fact("loss") == pytest.approx(expected.loss, rel=1e-6)
    assert report.fact("perplexity") == pytest.approx(math.exp(report.fact("loss")))
    assert report.fact("bits_per_byte") == pytest.approx(expected.bits_per_byte, rel=1e-6)

    unigram, bigram = bigram_nats(fit_bigram(train, VOCAB_SIZE, 10**9), validation, spans)
    assert report.fact("unigram_bits_per_byte") == pytest.approx(bits_per_byte(unigram, num_bytes))
    assert report.fact("bigram_bits_per_byte") == pytest.approx(bits_per_byte(bigram, num_bytes))
    train_text, text = ("".join(TEXTS[i] for i in split.doc_ids()).encode() for split in (train, validation))
    window = len(train_text) + len(text)
    sizes = xz_bytes(train_text, window), xz_bytes(train_text + text, window)
    assert report.fact("xz_bits_per_byte") == conditional_bits_per_byte(*sizes, num_bytes)
    assert json.loads(Path(report.path("report.json")).read_text())["loss"] == report.fact("loss")


@pytest.mark.ray
@pytest.mark.slow
def test_quantized_model_and_part_of_the_tokens(tmp_path: Path, local_ray: str) -> None:
    quantized, shards = make_quantized(tmp_path, make_checkpoint(tmp_path)), make_shards(tmp_path)
    settings = EvaluateSettings(seq_len=16, precision="fp32", max_tokens=300, baseline_tokens=0)
    report = evaluate(settings, stage_run(tmp_path, "EvalReport", quantized, shards))
    assert report.fact("model_kind") == "QuantizedModel"
    assert 300 - 16 * 3 <= report.fact("tokens") <= 304
    assert "xz_bits_per_byte" not in report.manifest.facts
    model = load_quantized(Path(quantized.path("model")))
    validation = TokenSplit.open(shards.uri, "validation")
    expected = score(model, validation, plan_spans(validation, 16, 300), report.fact("bytes"), micro_batch=8)
    assert report.fact("loss") == pytest.approx(expected.loss, rel=1e-5)


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "EvalReport", make_checkpoint(tmp_path, tokenizer_digest="t1"), make_shards(tmp_path))
    with pytest.raises(ArtifactError, match=r"\(tokenizer t0\) must be made with the model's tokenizer, t1; name in"):
        evaluate(EvaluateSettings(seq_len=32), run)


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "EvalReport", make_checkpoint(tmp_path), make_shards(tmp_path))
    with pytest.raises(ConfigError) as caught:
        evaluate(EvaluateSettings(seq_len=65), run)
    assert str(caught.value) == (
        "evalreport.seq_len (65) must be at most 64, the length the model was made for; try 64."
    )


def test_damaged_shard_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    shard = next(Path(shards.path("validation")).glob("*.arrow"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run = stage_run(tmp_path, "EvalReport", make_checkpoint(tmp_path), shards)
    with pytest.raises(ArtifactError, match=r"arrow \(sha256 \w+\) must have sha256"):
        evaluate(EvaluateSettings(seq_len=32), run)


def test_damaged_model_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    weights = Path(checkpoint.path("model/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    run = stage_run(tmp_path, "EvalReport", checkpoint, make_shards(tmp_path))
    with pytest.raises(ArtifactError, match=r"model.safetensors \(sha256 \w+\) must have sha256"):
        evaluate(EvaluateSettings(seq_len=32), run)
