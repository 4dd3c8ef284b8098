"""The tokenize stage: the same bytes for any number of workers, nothing done twice, clear refusals."""

import os
from collections import Counter
from pathlib import Path

import pytest

from ray_ds.artifacts import Artifact, Corpus, Tokenizer, TokenShards
from ray_ds.config.tokenize import TokenizeSettings
from ray_ds.config.tokenizer import TokenizerSettings
from ray_ds.data.shards import SPLITS, TokenSplit
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.stages.tokenize import TOKENIZE_FOLDER, check_counts, tokenize
from ray_ds.stages.tokenizer import learn
from ray_ds.tokenizer import load_tokenizer
from tests.data.raw_files import jsonl, read_bytes
from tests.on_ray.two_nodes import read_attempts
from tests.stages.small_artifacts import book_texts, flip_byte, make_corpus, stage_run

TEXTS = book_texts(12, 6)
SETTINGS = TokenizeSettings(validation_fraction=0.3, hold_out="group")


def make_tokenizer(folder: Path, corpus: Corpus) -> Artifact:
    run = stage_run(folder, "Tokenizer", corpus)
    facts = learn(TokenizerSettings(vocab_size=400), corpus, "t", run.path("tokenizer.json"))
    Path(run.path("chat_template.jinja")).write_text("{{ messages }}")
    return run.commit(facts, seconds=0.0)


def files(artifact: Artifact) -> dict[str, bytes]:
    return {info.path: Path(artifact.path(info.path)).read_bytes() for info in artifact.manifest.files}


@pytest.mark.shows("Token shards have the same bytes for any number of workers")
@pytest.mark.ray
def test_same_bytes_for_any_number_of_workers_and_no_work_twice(tmp_path: Path, local_ray: str) -> None:
    corpus = make_corpus(tmp_path, TEXTS, num_files=5)
    tokenizer = make_tokenizer(tmp_path, corpus)
    assert isinstance(tokenizer, Tokenizer)
    both = tokenize(SETTINGS, stage_run(tmp_path, "TokenShards", corpus, tokenizer, name="many"))
    one_at_a_time = TokenizeSettings(validation_fraction=0.3, hold_out="group", max_running_units=1)
    run = stage_run(tmp_path, "TokenShards", corpus, tokenizer, name="one")
    one = tokenize(one_at_a_time, run)
    assert isinstance(both, TokenShards)
    assert files(one) == files(both) and one.manifest.facts == both.manifest.facts
    assert "chat_template.jinja" not in files(both)  # which a model has not learnt from text

    assert both.fact("vocab_size") == tokenizer.fact("vocab_size") and both.fact("tokenizer_digest") == tokenizer.digest
    assert sum(both.fact("bytes").values()) == corpus.fact("bytes")
    bpe = load_tokenizer(both.path("tokenizer.json"))
    found = {}
    for name in SPLITS:
        split = TokenSplit.open(both.uri, name)
        found |= {i: bpe.decode(t.tolist()) for i, t in zip(split.doc_ids(), split.documents(), strict=True)}
        assert tuple(both.fact("shard_tokens", name).values()) == split.tokens_per_shard
        assert both.fact("tokens", name) == split.num_tokens and both.fact("documents", name) == split.num_documents
    assert found == TEXTS

    shard = Path(run.path("train/00001.arrow"))
    os.utime(shard, ns=(1, 1))
    Path(run.path("manifest.json")).unlink()
    commits = {path.name.partition("-")[0]: path for path in Path(run.path(TOKENIZE_FOLDER, "commits")).iterdir()}
    commits["00003"].unlink()  # as if killed before this file was finished
    commits["00004"].write_bytes(b'{"unit": "000')
    Path(run.path("train/00000.arrow")).unlink()
    Path(run.path("validation/00002.arrow")).write_bytes(b"cut")
    assert files(tokenize(SETTINGS, run)) == files(both)
    assert shard.stat().st_mtime_ns == 1
    attempts = Counter(attempt["unit"] for attempt in read_attempts(Path(run.path(TOKENIZE_FOLDER))))
    assert attempts == {"00000": 2, "00001": 1, "00002": 2, "00003": 2, "00004": 2}


@pytest.mark.ray
def test_error_in_a_task_comes_home_as_it_was(tmp_path: Path, local_ray: str) -> None:
    records = read_bytes(tmp_path, "raw.jsonl", jsonl(*({"id": f"book0/{i}", "text": "x"} for i in range(3))))
    corpus = make_corpus(tmp_path, {record.doc_id: record.text or "" for record in records})
    with pytest.raises(ConfigError) as caught:
        tokenize(SETTINGS, stage_run(tmp_path, "TokenShards", corpus, make_tokenizer(tmp_path, corpus)))
    assert str(caught.value) == (
        "tokenshards.hold_out (group) must be document where documents have no id of their own, such as "
        f"{caught.value.allowed.split()[-1]}; name their id_column in the clean step."
    )


@pytest.mark.ray
@pytest.mark.parametrize("kind", [Corpus, Tokenizer])
def test_a_flipped_byte_in_an_input_is_noticed_before_work(
    tmp_path: Path, local_ray: str, kind: type[Artifact]
) -> None:
    corpus = make_corpus(tmp_path, TEXTS)
    run = stage_run(tmp_path, "TokenShards", corpus, make_tokenizer(tmp_path, corpus))
    damaged = flip_byte(run.input(kind))
    with pytest.raises(ArtifactError) as caught:
        tokenize(SETTINGS, run)
    assert str(caught.value).startswith(f"{damaged} (sha256 ") and "as its manifest says" in str(caught.value)
    assert not Path(run.uri).exists()


def test_tokenizer_of_another_corpus_is_refused(tmp_path: Path) -> None:
    corpus, other = make_corpus(tmp_path, TEXTS), make_corpus(tmp_path, TEXTS, name="other")
    run = stage_run(tmp_path, "TokenShards", corpus, make_tokenizer(tmp_path, other))
    with pytest.raises(
        ArtifactError, match=rf"\(trained on corpus {other.digest}\) must be .* tokenized, {corpus.digest}"
    ):
        tokenize(SETTINGS, run)


@pytest.mark.parametrize(("empty", "advice"), [("validation", "raise it"), ("train", "lower it")])
def test_empty_split_says_what_to_do(tmp_path: Path, empty: str, advice: str) -> None:
    corpus = make_corpus(tmp_path, {"a": "b", "c": "d"})
    documents = {name: 0 if name == empty else 2 for name in SPLITS}
    with pytest.raises(ConfigError) as caught:
        check_counts({"documents": documents}, corpus, TokenizeSettings(), "chat_tokens")
    assert str(caught.value) == (
        f"chat_tokens.validation_fraction (0.05) must leave documents for {empty}: of 2 it has none "
        f"(hold_out = document, seed = 0); {advice}, choose another seed, or give more text."
    )


def test_lost_documents_are_noticed(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": "b", "c": "d", "e": "f"})
    with pytest.raises(ArtifactError, match=r"\(2\) must have 3 documents, as its manifest says"):
        check_counts({"documents": {"train": 1, "validation": 1}}, corpus, TokenizeSettings(), "tokenize")
