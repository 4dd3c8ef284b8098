"""A tokenizer's files in Hugging Face's layout: what an imported one marks texts with, and ours for other programs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from ray_ds import storage
from ray_ds.artifacts import make_digest
from ray_ds.errors import ArtifactError
from ray_ds.exchange.sources import read_json
from ray_ds.tokenizer import (
    BOS_TOKEN,
    MARK_TOKENS,
    OUR_SPECIAL_IDS,
    BpeTokenizer,
    SpecialIds,
    find_problem,
    load_tokenizer,
)
from ray_ds.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_IDS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
)

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
USE_FAST = "save it anew with transformers: AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH)"


@dataclass(frozen=True, kw_only=True)
class ImportedTokenizer:
    """A folder's tokenizer."""

    files: Mapping[str, bytes]
    """As they are, and `special_ids.json`."""
    special_ids: SpecialIds
    vocab_size: int

    @property
    def digest(self) -> str:
        """What says that two models have the same tokenizer, in 16 hexadecimal digits.

        Which tokens end an answer is a model's matter: a chat model may have the tokenizer of its base model.
        """
        content = json.loads(self.files[TOKENIZER_FILE])
        content.pop("post_processor", None)
        return make_digest(["tokenizer", content, self.special_ids.bos_id])


def read_tokenizer(folder: str, model: Mapping[str, Any], generation: Mapping[str, Any]) -> ImportedTokenizer:
    """Return the tokenizer of a Hugging Face folder.

    Args:
        model: its `config.json`.
        generation: its `generation_config.json`.
    Raises:
        ArtifactError: it is missing, is no byte-level BPE, or nothing says how a text ends.
    """
    uri = storage.join(folder, TOKENIZER_FILE)
    if not storage.exists(uri):
        raise ArtifactError(uri, "missing", "must hold the tokenizer", USE_FAST)
    names = [
        name for name in TOKENIZER_FILES if name != SPECIAL_IDS_FILE and storage.exists(storage.join(folder, name))
    ]
    files = {name: storage.read_bytes(storage.join(folder, name)) for name in names}
    text = files[TOKENIZER_FILE].decode("utf-8", errors="replace")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ArtifactError(uri, str(error), "must be a tokenizer of the `tokenizers` package", USE_FAST) from error
    special_ids = _find_special_ids(folder, tokenizer, model, generation)
    problem = find_problem(text, special_ids)
    if problem:
        raise ArtifactError(uri, problem, "must be a byte-level BPE, as Llama 3, Qwen and DeepSeek have it", USE_FAST)
    template = _embedded_template(folder)
    if template is not None:
        files.setdefault(CHAT_TEMPLATE_FILE, template.encode())
    files[SPECIAL_IDS_FILE] = json.dumps(asdict(special_ids), indent=1).encode() + b"\n"
    vocab_size = BpeTokenizer(tokenizer, special_ids).vocab_size
    return ImportedTokenizer(files=files, special_ids=special_ids, vocab_size=vocab_size)


def _find_special_ids(
    folder: str, tokenizer: Tokenizer, model: Mapping[str, Any], generation: Mapping[str, Any]
) -> SpecialIds:
    """Return which ids mark places: the tokenizer's own files first, then those of the model."""
    config = read_json(storage.join(folder, TOKENIZER_CONFIG_FILE))
    tables = [config, read_json(storage.join(folder, SPECIAL_TOKENS_FILE))]

    def find(mark: str) -> list[int]:
        named = [tokenizer.token_to_id(_content(table[mark])) for table in tables if table.get(mark)]
        given = [table.get(f"{mark}_id") for table in (generation, model)]
        listed = [i for value in given for i in (value if isinstance(value, list) else [value])]
        return list(dict.fromkeys(i for i in (*named, *listed) if isinstance(i, int)))

    ends = find("eos_token")
    if not ends:
        field = f"{storage.join(folder, TOKENIZER_CONFIG_FILE)}: eos_token"
        raise ArtifactError(field, "missing", "must name a token of tokenizer.json", "add it, as the model card says")
    start = next(iter(find("bos_token")), ends[0])
    adds = config.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = tokenizer.encode("", add_special_tokens=True).ids[:1] == [start]
    pad = next(iter(find("pad_token")), ends[0])
    return SpecialIds(bos_id=start, eos_ids=tuple(ends), pad_id=pad, adds_bos=adds)


def _embedded_template(folder: str) -> str | None:
    """Return the chat template of a `tokenizer_config.json`, where folders had it before they had a file for it."""
    found = read_json(storage.join(folder, TOKENIZER_CONFIG_FILE)).get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _content(token: Any) -> str:
    """Return the text of a token, which is written plainly or as a table."""
    return str(token["content"] if isinstance(token, dict) else token)


def exported_files(folder: str) -> dict[str, bytes]:
    """Return the files of a checkpoint's tokenizer for other programs, which put BOS before a text where we do.

    An imported one's are as they came. Ours gets a `tokenizer_config.json`, if it has none, and its BOS.

    Raises:
        ArtifactError: the tokenizer is damaged.
    """
    tokenizer = load_tokenizer(storage.join(folder, TOKENIZER_FILE))
    names = [
        name for name in TOKENIZER_FILES if name != SPECIAL_IDS_FILE and storage.exists(storage.join(folder, name))
    ]
    files = {name: storage.read_bytes(storage.join(folder, name)) for name in names}
    if tokenizer.marks is not OUR_SPECIAL_IDS:
        return files
    content = json.loads(files[TOKENIZER_FILE])
    content["post_processor"] = _bos_before(BOS_TOKEN, tokenizer.bos_id)
    files[TOKENIZER_FILE] = json.dumps(content, indent=2, ensure_ascii=False).encode()
    marks = dict(zip(("bos_token", "eos_token", "pad_token"), MARK_TOKENS, strict=True))
    given = json.loads(files.get(TOKENIZER_CONFIG_FILE, b"{}"))
    files[TOKENIZER_CONFIG_FILE] = _encode({**_OUR_CONFIG, **marks, **given})
    files.setdefault(SPECIAL_TOKENS_FILE, _encode(marks))
    return files


_OUR_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _encode(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _bos_before(token: str, token_id: int) -> dict[str, Any]:
    """Return the part of a `tokenizer.json` that puts a token before each text."""

    def sequence(parts: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
        return [{kind: {"id": name, "type_id": number}} for kind, name, number in parts]

    return {
        "type": "TemplateProcessing",
        "single": sequence([("SpecialToken", token, 0), ("Sequence", "A", 0)]),
        "pair": sequence(
            [("SpecialToken", token, 0), ("Sequence", "A", 0), ("SpecialToken", token, 1), ("Sequence", "B", 1)]
        ),
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
