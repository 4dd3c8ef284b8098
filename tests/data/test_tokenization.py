"""A piece of a corpus becomes the same shards whenever, wherever and however often it is done."""

import dataclasses
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.artifacts import Corpus
from ray_ds.data.documents import file_names, group_of
from ray_ds.data.shards import SPLITS, TokenSplit
from ray_ds.data.tokenization import Counts, TokenizeJob, count_shards, split_of, sum_counts, tokenize_file
from ray_ds.errors import ConfigError
from ray_ds.tokenizer import BpeTokenizer, train_bpe
from tests.data.raw_files import jsonl, read_bytes
from tests.stages.small_artifacts import book_texts, make_corpus

TEXTS = book_texts(12, 6)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path, TEXTS)


@pytest.fixture
def tokenizer() -> BpeTokenizer:
    return train_bpe(TEXTS.values(), 400)


@pytest.fixture
def job(tmp_path: Path, corpus: Corpus, tokenizer: BpeTokenizer) -> TokenizeJob:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    return TokenizeJob(
        step="tokenize",
        corpus_uri=corpus.uri,
        tokenizer_uri=str(tmp_path / "tokenizer.json"),
        validation_fraction=0.3,
        hold_out="group",
        seed=0,
    )


@dataclasses.dataclass
class Published:
    """What was published, and what the files were said to hold."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    counts: dict[str, Counts] = dataclasses.field(default_factory=dict)

    def publish(self, path: str, data: bytes) -> None:
        self.files[path] = data


def test_every_document_is_bos_and_its_tokens_in_one_split(
    job: TokenizeJob, corpus: Corpus, tokenizer: BpeTokenizer, tmp_path: Path
) -> None:
    def publish(path: str, data: bytes) -> None:
        storage.write_bytes(f"{tmp_path}/out/{path}", data)

    parts = {name: tokenize_file(name, publish, job) for name in file_names(corpus)}
    counts, of_shards = sum_counts(parts.values()), count_shards(parts)
    found: dict[str, str] = {}
    for name in SPLITS:
        split = TokenSplit.open(f"{tmp_path}/out", name)
        for doc_id, tokens in zip(split.doc_ids(), split.documents(), strict=True):
            assert tokens[0] == tokenizer.bos_id and tokens[1:].min() > 2
            assert split_of(doc_id, job) == name
            found[doc_id] = tokenizer.decode(tokens.tolist())
        assert counts["documents"][name] == split.num_documents
        assert counts["tokens"][name] == split.num_tokens
        shards = sorted(path.name for path in (tmp_path / "out" / name).iterdir())
        assert dict(zip(shards, split.tokens_per_shard, strict=True)) == of_shards[name]
    assert found == TEXTS
    assert sum(counts["bytes"].values()) == corpus.fact("bytes")


def test_groups_are_held_out_whole(job: TokenizeJob) -> None:
    splits: dict[str, set[str]] = {}
    for doc_id in TEXTS:
        splits.setdefault(group_of(doc_id) or "", set()).add(split_of(doc_id, job))
    assert len(splits) == 12 and set.union(*splits.values()) == {"train", "validation"}
    assert all(len(found) == 1 for found in splits.values())
    by_document = dataclasses.replace(job, hold_out="document")
    assert len({split_of(f"0123456789ab-{i}:book0/{i}", by_document) for i in range(40)}) == 2


def test_groups_need_ids(job: TokenizeJob, tmp_path: Path) -> None:
    (record,) = read_bytes(tmp_path, "raw.jsonl", jsonl({"text": "x", "id": "book0/0"}))  # and no id_column
    nameless = dataclasses.replace(job, corpus_uri=make_corpus(tmp_path, {record.doc_id: "x"}, name="nameless").uri)
    with pytest.raises(ConfigError) as caught:
        for name in ("00000", "00001", "00002"):
            tokenize_file(name, Published().publish, nameless)
    assert str(caught.value) == (
        f"tokenize.hold_out (group) must be document where documents have no id of their own, such as {record.doc_id}; "
        "name their id_column in the clean step."
    )


def test_share_held_out_is_what_was_asked(job: TokenizeJob) -> None:
    by_document = dataclasses.replace(job, hold_out="document", validation_fraction=0.05)
    held_out = sum(split_of(f"d{i}", by_document) == "validation" for i in range(20_000))
    assert abs(held_out - 1000) < 100


def test_order_and_repetition_do_not_change_a_byte(job: TokenizeJob, corpus: Corpus) -> None:
    names = file_names(corpus)
    once, often = Published(), Published()
    for name in names:
        once.counts[name] = tokenize_file(name, once.publish, job)
    for name in [*reversed(names), names[1]]:
        often.counts[name] = tokenize_file(name, often.publish, job)
    assert once == often and len(once.files) == 2 * len(names)
