"""Imported tokenizers encode as in transformers, ours as exported does too."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_ds.errors import ArtifactError
from ray_ds.exchange.tokenizer import exported_files, read_tokenizer
from ray_ds.tokenizer import ROUND_TRIP_PROBES, BpeTokenizer, load_tokenizer, train_bpe
from ray_ds.tokenizer_files import copy_tokenizer
from tests.exchange.hf_folders import MARKS, TEXTS, save_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
STYLES = list(MARKS)
PROBES = [*TEXTS, *ROUND_TRIP_PROBES, "", " ", "a\r\nb\rc\n", "x" * 500, "<think>so</think>", "e\u0301", "1234567"]


def imported(folder: Path, style: str, generation: dict[str, Any] | None = None, **changes: Any) -> BpeTokenizer:
    save_tokenizer(folder, style, **changes)
    for name, data in read_tokenizer(str(folder), {}, generation or {}).files.items():
        (folder / name).write_bytes(data)
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.shows("Llama 3's, Qwen's and DeepSeek's tokenizers encode here as in transformers")
@pytest.mark.parametrize("style", STYLES)
def test_it_encodes_as_in_transformers(style: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = imported(tmp_path, style)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in PROBES:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == ids, text
        if text:
            assert ours.encode_prompt(text) == theirs(text, split_special_tokens=True).input_ids
        wanted = theirs.backend_tokenizer.normalizer.normalize_str(text) if style == "qwen" else text
        assert ours.decode(ids) == wanted
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("style", STYLES)
def test_text_that_spells_a_special_token_is_text(style: str, tmp_path: Path) -> None:
    tokenizer = imported(tmp_path, style)
    for name in filter(None, MARKS[style].values()):
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.decode(ids) == f"a{name}b"
        assert not set(ids) & {tokenizer.bos_id, *tokenizer.stop_ids}


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_have_no_bytes_and_all_others_have(style: str, tmp_path: Path) -> None:
    tokenizer = imported(tmp_path, style)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    assert {i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)} == special
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""  # a row of the model's table that is no token


def test_marks_are_found_where_families_keep_them(tmp_path: Path) -> None:
    llama = imported(tmp_path / "llama3", "llama3", {"bos_token_id": 7, "eos_token_id": [361, 362]})
    names = {
        name: llama._tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    }
    assert (llama.bos_id, llama.eos_id) == (names["<|begin_of_text|>"], names["<|eot_id|>"])
    assert llama.stop_ids == {*names.values()} and llama.marks.adds_bos
    end = names["<|eot_id|>"]
    assert llama.pad_id == end

    qwen = imported(tmp_path / "qwen", "qwen", {"bos_token_id": 360})
    assert not qwen.marks.adds_bos
    assert qwen.encode_prompt("the") == qwen.encode("the") and qwen.encode_prompt("") == [360]
    assert qwen.pad_id == qwen._tokenizer.token_to_id("<|endoftext|>") == 360

    alone = imported(tmp_path / "alone", "qwen")
    assert alone.bos_id == alone.eos_id == alone._tokenizer.token_to_id("<|im_end|>")

    deepseek = imported(tmp_path / "deepseek", "deepseek", add_bos_token=True)
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1) and deepseek.marks.adds_bos


def test_the_digest_tells_tokenizers_apart_but_not_what_ends_an_answer(tmp_path: Path) -> None:
    for name in ("base", "chat"):
        save_tokenizer(tmp_path / name, "llama3")
    save_tokenizer(tmp_path / "other", "deepseek")
    base = read_tokenizer(str(tmp_path / "base"), {}, {})
    chat = read_tokenizer(str(tmp_path / "chat"), {}, {"eos_token_id": [361, 362]})
    other = read_tokenizer(str(tmp_path / "other"), {}, {})
    assert base.digest == chat.digest != other.digest
    assert base.special_ids != chat.special_ids


def test_a_tokenizer_keeps_its_files_from_folder_to_folder(tmp_path: Path) -> None:
    first = imported(tmp_path / "a", "deepseek")
    copy_tokenizer(str(tmp_path / "a"), str(tmp_path / "b"))
    second = load_tokenizer(str(tmp_path / "b/tokenizer.json"))
    assert second.marks == first.marks
    assert (tmp_path / "b/chat_template.jinja").read_bytes() == (tmp_path / "a/chat_template.jinja").read_bytes()


@pytest.mark.parametrize("in_list", [False, True])
def test_an_older_folders_chat_template_gets_a_file(in_list: bool, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages }}"}]
    config["chat_template"] = named if in_list else "{{ messages }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(str(tmp_path), {}, {}).files["chat_template.jinja"] == b"{{ messages }}"


@pytest.mark.shows("An exported tokenizer of ours encodes in transformers as here, BOS included")
def test_ours_encodes_in_transformers_as_here(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = train_bpe(TEXTS * 4, 400)
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    out = tmp_path / "out"
    out.mkdir()
    for name, data in exported_files(str(tmp_path)).items():
        (out / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in PROBES:
        ids = theirs(text, split_special_tokens=True).input_ids
        assert ids == [ours.bos_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert read_tokenizer(str(out), {}, {}).special_ids == ours.marks


def change(folder: Path, do: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    do(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (
            lambda c: c.update(normalizer={"type": "Lowercase"}),
            r"\(normalizer Lowercase\) must be a byte-level BPE, as Ll",
        ),
        (
            lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
            r"\(no ByteLevel pre-tokenizer\) must be a byte-level",
        ),
        (lambda c: c["model"]["vocab"].pop("!"), r"must be a"),
    ],
)
def test_other_kinds_are_refused(do: Any, message: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama3")
    change(tmp_path, do)
    with pytest.raises(ArtifactError, match=message):
        read_tokenizer(str(tmp_path), {}, {})


def test_a_text_without_an_end_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama3", eos_token=None)
    with pytest.raises(
        ArtifactError, match=r"tokenizer_config.json: eos_token \(missing\) must name a token of tokeniz"
    ):
        read_tokenizer(str(tmp_path), {}, {})


def test_damaged_special_ids_are_refused(tmp_path: Path) -> None:
    imported(tmp_path, "llama3")
    (tmp_path / "special_ids.json").write_text('{"bos_id": 1}')
    with pytest.raises(ArtifactError, match=r"special_ids.json \(13 bytes\) must hold the ids of special tokens"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_ids.json").write_text('{"bos_id": 999, "eos_ids": [1], "pad_id": 2, "adds_bos": true}')
    with pytest.raises(ArtifactError, match=r"tokenizer.json \(special id 999 has no token\) must be"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
