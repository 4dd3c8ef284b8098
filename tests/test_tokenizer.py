"""The tokenizer gives back every text, keeps classes of characters apart, and does not depend on chance."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ray_ds.config.tokenizer import MIN_VOCAB_SIZE
from ray_ds.errors import ArtifactError, InputError
from ray_ds.tokenizer import MARK_TOKENS, ROUND_TRIP_PROBES, SPECIAL_TOKENS, BpeTokenizer, load_tokenizer, train_bpe

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;\n\n" * 4,
    "太初有道，道與神同在，道就是神。今天天气很好，我们去公园散步，今天天气很好。" * 4,
    "In 1999 and in 2024, 1024 of 4096 were 3.14159; it's 20% more than we'll need!!!  \n\tdef main(): pass\n" * 4,
]


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_bpe(TEXTS, 600)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD7FF)]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 80))).replace("\ud800", "")
        for _ in range(count)
    ]


@pytest.mark.shows("Every text comes back from its tokens unchanged, Chinese and emoji too")
def test_every_text_comes_back(tokenizer: BpeTokenizer) -> None:
    for text in [*ROUND_TRIP_PROBES, *random_texts(300), "", " ", "\x00", "\ufeffa", "a\r\nb\rc\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_text_is_not_normalized(tokenizer: BpeTokenizer) -> None:
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    assert tokenizer.decode(tokenizer.encode(composed)) == composed
    assert tokenizer.decode(tokenizer.encode(decomposed)) == decomposed
    assert tokenizer.encode(composed) != tokenizer.encode(decomposed)


def test_tokens_are_bytes_and_all_bytes_have_one(tokenizer: BpeTokenizer) -> None:
    singles = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    assert sorted(singles) == [bytes([byte]) for byte in range(256)]
    ids = tokenizer.encode(ROUND_TRIP_PROBES[1])
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == ROUND_TRIP_PROBES[1].encode()
    half = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe5"]
    assert tokenizer.decode(half) == "\ufffd" and tokenizer.decode_bytes(half) == b"\xe5"


def test_special_tokens_have_fixed_ids_and_no_text(tokenizer: BpeTokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert [tokenizer.special_ids[f"<|{role}|>"] for role in ("system", "user", "assistant", "tool")] == [3, 4, 5, 6]
    assert {tokenizer.token_bytes(i) for i in range(7)} == {b""} and tokenizer.stop_ids == {0, 1, 3, 4, 5, 6}
    ids = tokenizer.encode("a")
    assert tokenizer.decode([0, *ids, 1]) == "a"


def test_text_that_spells_a_special_token_stays_text(tokenizer: BpeTokenizer) -> None:
    for special in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"x{special}y")
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(ids) == f"x{special}y"


def test_digits_are_single(tokenizer: BpeTokenizer) -> None:
    for i in range(tokenizer.vocab_size):
        assert sum(48 <= byte <= 57 for byte in tokenizer.token_bytes(i)) == 0 or len(tokenizer.token_bytes(i)) == 1
    assert len(tokenizer.encode("19992024")) == 8


def test_no_token_mixes_classes(tokenizer: BpeTokenizer) -> None:
    def classes(text: str) -> set[str]:
        kinds = {
            "han" if "CJK" in unicodedata.name(c, "") else "line" if c in "\r\n" else unicodedata.category(c)[0]
            for c in text.lstrip(" ").lstrip("'")
        }
        return {"symbol" if kind in "PS" else kind for kind in kinds}

    learned = [tokenizer.token_bytes(i).decode("utf-8", errors="ignore") for i in range(tokenizer.vocab_size)]
    assert all(len(classes(text)) <= 1 for text in learned)
    assert any(len(text) > 1 and classes(text) == {"han"} for text in learned)
    assert " the" in learned and "'ll" not in ["".join(text.split()) for text in learned if text.startswith(" ")]


def test_training_twice_gives_the_same_bytes_in_other_processes() -> None:
    code = (
        "import hashlib; from ray_ds.tokenizer import train_bpe; "
        f"texts = {TEXTS!r}; print(hashlib.sha256(train_bpe(texts, 600).to_json().encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(runs) == 1


def test_small_corpus_gives_fewer_tokens() -> None:
    tokenizer = train_bpe(["ab ab"], 4096)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE + 1  # "ab" is all that occurs twice
    assert tokenizer.decode(tokenizer.encode("zürich 東京")) == "zürich 東京"
    assert train_bpe([], MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE


def test_saved_tokenizer_is_the_same_here_and_in_transformers(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load_tokenizer(str(path))
    independent = PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert loaded.to_json() == tokenizer.to_json()
    for text in [*TEXTS, *ROUND_TRIP_PROBES[:2]]:
        assert loaded.encode(text) == tokenizer.encode(text) == independent.encode(text, add_special_tokens=False)
        assert independent.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_round_trip_check_names_the_text(tokenizer: BpeTokenizer) -> None:
    class Lossy(BpeTokenizer):
        def decode(self, ids: object) -> str:
            return super().decode(ids).replace("道", "?")  # type: ignore[arg-type]

    lossy = Lossy(tokenizer._tokenizer)
    assert tokenizer.check_round_trip([("a", "道"), ("b", "one")]) == sum(
        map(len, tokenizer.encode_batch(["道", "one"]))
    )
    with pytest.raises(InputError, match=r"text kjv:1 \(character 1 is '道' and comes back as '\?'\) must come back"):
        lossy.check_round_trip([("kjv:0", "fine"), ("kjv:1", "太道")])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["model"].update(type="WordPiece"), "model WordPiece"),
        (lambda content: content["added_tokens"].pop(), r"special tokens <\|bos\|>, .*, <\|assistant\|>\)"),
        (lambda content: content["model"]["vocab"].pop("a"), "1 bytes have no token"),
        (lambda content: content.pop("model"), "damaged: KeyError 'model'"),
    ],
)
def test_foreign_tokenizer_is_refused(tokenizer: BpeTokenizer, tmp_path: Path, change: object, problem: str) -> None:
    content = json.loads(tokenizer.to_json())
    change(content)  # type: ignore[operator]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=problem):
        load_tokenizer(str(path))


def test_a_tokenizer_without_role_tokens_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ds.tokenizer.SPECIAL_TOKENS", MARK_TOKENS)
    (tmp_path / "tokenizer.json").write_text(train_bpe(TEXTS, 600).to_json())
    monkeypatch.undo()
    old = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert old.special_ids == {"<|bos|>": 0, "<|eos|>": 1, "<|pad|>": 2}
    assert old.decode(old.encode("<|user|>太初")) == "<|user|>太初"


def test_missing_and_damaged_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer.json \(missing\) must be a tokenizer.json; run the tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
    with pytest.raises(ArtifactError, match="damaged: JSONDecodeError"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
