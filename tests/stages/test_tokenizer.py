"""The tokenizer stage learns from a sample that depends on the corpus alone, and checks what it learned."""

import json
from pathlib import Path

import pytest

from ray_ds.artifacts import Tokenizer
from ray_ds.chat.template import ROLE_TEMPLATE
from ray_ds.config.tokenizer import TokenizerSettings
from ray_ds.errors import ArtifactError, ConfigError, InputError
from ray_ds.stages import tokenizer as stage
from ray_ds.stages.tokenizer import learn, train_tokenizer
from ray_ds.tokenizer import load_tokenizer, train_bpe
from tests.stages.small_artifacts import book_texts, flip_byte, make_corpus, stage_run

TEXTS = book_texts(10, 12)


def test_whole_corpus_is_learned_in_order(tmp_path: Path) -> None:
    uri = str(tmp_path / "tokenizer.json")
    corpus = make_corpus(tmp_path, TEXTS)
    facts = learn(TokenizerSettings(vocab_size=330, check_documents=5), corpus, "tokenizer", uri)
    expected = train_bpe(TEXTS.values(), 330)
    assert Path(uri).read_text(encoding="utf-8") == expected.to_json()
    assert facts["vocab_size"] == 330
    assert facts["sample"] == {"documents": 120, "bytes": corpus.fact("bytes")}
    measured = corpus.fact("bytes") / sum(map(len, expected.encode_batch(list(TEXTS.values()))))
    assert facts["bytes_per_token"] == pytest.approx(measured, rel=0.05)


def test_sample_is_the_same_however_the_corpus_is_cut(tmp_path: Path) -> None:
    half = TokenizerSettings(vocab_size=300, sample_bytes=sum(len(text.encode()) for text in TEXTS.values()) // 2)
    results = []
    for num_files in (1, 7):
        corpus = make_corpus(tmp_path / str(num_files), TEXTS, num_files=num_files)
        uri = str(tmp_path / f"{num_files}.json")
        results.append((learn(half, corpus, "tokenizer", uri), Path(uri).read_bytes()))
    assert results[0] == results[1]
    assert 30 < results[0][0]["sample"]["documents"] < 90  # type: ignore[index, call-overload, operator]
    other_seed = TokenizerSettings(vocab_size=300, sample_bytes=half.sample_bytes, seed=1)
    assert learn(other_seed, corpus, "tokenizer", str(tmp_path / "c.json"))["sample"] != results[0][0]["sample"]


def test_sample_without_a_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bpe.sample_bytes \(1\) must be enough for a document; raise it"):
        learn(TokenizerSettings(sample_bytes=1), make_corpus(tmp_path, {"a": "b" * 10**6}), "bpe", str(tmp_path / "t"))


def test_text_that_does_not_come_back_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(texts: object, vocab_size: int) -> object:
        tokenizer = train_bpe(texts, vocab_size)  # type: ignore[arg-type]
        monkeypatch.setattr(tokenizer, "decode", lambda ids: "lost")
        return tokenizer

    monkeypatch.setattr(stage, "train_bpe", lossy)
    with pytest.raises(InputError, match=r"text probe 0 .* must come back unchanged from the tokenizer"):
        learn(TokenizerSettings(vocab_size=300), make_corpus(tmp_path, TEXTS), "tokenizer", str(tmp_path / "t.json"))
    assert not (tmp_path / "t.json").exists()


@pytest.mark.ray
def test_stage_writes_an_artefact_and_brings_errors_home(
    tmp_path: Path, local_ray: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus(tmp_path, TEXTS)
    with caplog.at_level("INFO", "ray_ds"):
        artifact = train_tokenizer(TokenizerSettings(vocab_size=4096), stage_run(tmp_path, "Tokenizer", corpus))
    assert isinstance(artifact, Tokenizer) and artifact.input_digest("Corpus") == corpus.digest
    tokenizer = load_tokenizer(artifact.path("tokenizer.json"))
    assert artifact.fact("vocab_size") == tokenizer.vocab_size < 4096
    assert Path(artifact.path("chat_template.jinja")).read_text() == ROLE_TEMPLATE
    assert f"vocabulary_is_smaller asked=4096 got={tokenizer.vocab_size}" in caplog.text
    assert len(json.loads(tokenizer.to_json())["model"]["vocab"]) == tokenizer.vocab_size
    run = stage_run(tmp_path, "Tokenizer", corpus, name="b")
    with pytest.raises(ConfigError, match=r"^tokenizer.sample_bytes \(1\) must be enough for a document"):
        train_tokenizer(TokenizerSettings(sample_bytes=1), run)


@pytest.mark.ray
def test_a_flipped_byte_in_the_corpus_is_noticed_before_work(tmp_path: Path, local_ray: str) -> None:
    corpus = make_corpus(tmp_path, TEXTS)
    run = stage_run(tmp_path, "Tokenizer", corpus)
    damaged = flip_byte(corpus)
    with pytest.raises(ArtifactError) as caught:
        train_tokenizer(TokenizerSettings(vocab_size=300), run)
    assert str(caught.value).startswith(f"{damaged} (sha256 ") and "as its manifest says" in str(caught.value)
    assert not Path(run.uri).exists()
