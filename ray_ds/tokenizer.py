"""Byte-level BPE: train, load, encode, decode. Any string goes through it and comes back unchanged."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ray_ds import storage
from ray_ds.config.tokenizer import MIN_VOCAB_SIZE
from ray_ds.errors import ArtifactError, InputError
from ray_ds.tokenizer_files import SPECIAL_IDS_FILE

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"
MARK_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
ROLES = ("system", "user", "assistant", "tool")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
"""Each begins a message in a conversation; `chat.template.ROLE_TEMPLATE` writes them."""
SPECIAL_TOKENS = (*MARK_TOKENS, *ROLE_TOKENS)
"""Their ids are their places here, from 0. Tokenizers that were trained before there were tokens for roles have the
first three alone."""

CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"

WORD_PATTERN = "|".join(
    [
        r"'(?i:s|t|re|ve|m|ll|d)(?![\p{L}\p{M}])",  # English: it|'s, we|'ll; not the quote in 'dog'
        r"\p{N}",  # a digit is a token of its own, so that numbers have one spelling
        rf"[{CJK}]+",  # a run of Chinese or Japanese characters, without the Latin text around it
        rf" ?[\p{{L}}\p{{M}}&&[^{CJK}]]+",  # a word of any other script, with the space before it
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # punctuation and symbols
        r"[\r\n]+",  # line ends, which merge with nothing else
        r"[^\S\r\n]+(?!\S)|[^\S\r\n]+",  # blanks; the last one goes with the word that follows
    ]
)
"""Where text is cut before merging: BPE merges within a piece, never across. The classes that DeepSeek-LLM keeps apart
(arXiv 2401.02954, 2.1): digits, CJK, line ends, punctuation; the rest as in GPT-2's pattern. Oniguruma syntax."""

ROUND_TRIP_PROBES = (
    "In the beginning God created the heaven and the earth.\n\n  Indented;\ttabbed, it's 3.14159 -- 'quoted'!\r\n",
    "太初有道，道與神同在。今天是2024年3月15日，气温零下5℃；“你好，world”！",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇳 ❤️ e\u0301 é ﬁ \u200b\ufeff\x00\x1b\x7f " + SPECIAL_TOKENS[0],
)
"""Texts that a tokenizer must give back whatever it was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """The ids that mark places in a text, where a tokenizer has others than ours; `special_ids.json` holds them."""

    bos_id: int
    """Starts a document."""
    eos_ids: tuple[int, ...]
    """End an answer; the first is the tokenizer's own, others are the model's."""
    pad_id: int
    """Fills rows."""
    adds_bos: bool
    """Whether a prompt starts with BOS."""


OUR_SPECIAL_IDS = SpecialIds(bos_id=0, eos_ids=(1,), pad_id=2, adds_bos=True)


class BpeTokenizer:
    """A byte-level BPE, ours or an imported one; ids are below `vocab_size`."""

    def __init__(self, tokenizer: Tokenizer, special_ids: SpecialIds = OUR_SPECIAL_IDS) -> None:
        # Text that spells a special token is text: otherwise a document could end itself.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._token_bytes = _token_bytes(tokenizer)
        self.vocab_size = len(self._token_bytes)
        self.marks = special_ids
        self.bos_id, self.eos_id, self.pad_id = special_ids.bos_id, special_ids.eos_ids[0], special_ids.pad_id
        self.special_ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        """Ids of the tokens that no text is encoded to, by their names."""
        roles = [self.special_ids[name] for name in ROLE_TOKENS if name in self.special_ids]
        self.stop_ids = frozenset((special_ids.bos_id, *special_ids.eos_ids, *roles))
        """The ids that end an answer: no document goes on behind them, or another's turn begins."""

    @property
    def bos_token(self) -> str:
        """Name of the token that starts a document."""
        return str(self._tokenizer.id_to_token(self.bos_id))

    @property
    def eos_token(self) -> str:
        """Name of the token that ends an answer."""
        return str(self._tokenizer.id_to_token(self.eos_id))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; on all cores unless TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that a model is given for a text: after BOS where documents started so in its training.

        An empty text is BOS, whatever the tokenizer, for a model must be given something.
        """
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.marks.adds_bos or not ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens have none; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids, which may start and end within a character."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one id stands for: none for a special token, or for one that only the model knows.

        Published models have more rows in their tables than their tokenizers have tokens.
        """
        return self._token_bytes[token_id] if token_id < self.vocab_size else b""

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, in Hugging Face's layout."""
        return str(self._tokenizer.to_str(pretty=True))

    def check_round_trip(self, texts: Sequence[tuple[str, str]]) -> int:
        """Encode and decode (name, text) pairs; return how many tokens they have.

        Raises:
            InputError: a text comes back changed; the message names it.
        """
        encoded = self.encode_batch([text for _, text in texts])
        for (name, text), ids in zip(texts, encoded, strict=True):
            decoded = self.decode(ids)
            if decoded != text:
                at = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), len(decoded))
                raise InputError(
                    f"text {name}",
                    f"character {at} is {text[at : at + 1]!r} and comes back as {decoded[at : at + 1]!r}",
                    "must come back unchanged from the tokenizer",
                    "remove the text or train the tokenizer anew",
                )
        return sum(map(len, encoded))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Return a tokenizer with at most `vocab_size` tokens.

    The result depends only on the texts. It has fewer tokens where no pair of tokens is left that occurs twice.
    """
    assert vocab_size >= MIN_VOCAB_SIZE, f"{vocab_size} < {MIN_VOCAB_SIZE}"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BpeTokenizer(tokenizer)


def load_tokenizer(uri: str) -> BpeTokenizer:
    """Return the tokenizer of a `tokenizer.json`, named by absolute path or URI.

    A `special_ids.json` beside it says what an imported tokenizer's special tokens are; without one they are ours.

    Raises:
        ArtifactError: the file is missing, or is no byte-level BPE with these special tokens.
    """
    if not storage.exists(uri):
        raise ArtifactError(uri, "missing", "must be a tokenizer.json", "run the tokenizer step")
    text = storage.read_bytes(uri).decode("utf-8", errors="replace")
    special_ids = read_special_ids(storage.join(uri.rsplit("/", 1)[0], SPECIAL_IDS_FILE))
    problem = find_problem(text, special_ids)
    if problem:
        allowed = "must be a byte-level BPE made by the tokenizer step, or imported with its special_ids.json"
        raise ArtifactError(uri, problem, allowed, "run that step again")
    return BpeTokenizer(Tokenizer.from_str(text), special_ids or OUR_SPECIAL_IDS)


def read_special_ids(uri: str) -> SpecialIds | None:
    """Return what a `special_ids.json` says, or None where there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    try:
        return pydantic.TypeAdapter(SpecialIds).validate_json(data)
    except pydantic.ValidationError as error:
        allowed = f"must hold the ids of special tokens ({error.errors()[0]['msg']})"
        raise ArtifactError(uri, f"{len(data)} bytes", allowed, "restore it, or import the tokenizer again") from error


def find_problem(text: str, special_ids: SpecialIds | None) -> str | None:
    """Say what keeps the content of a `tokenizer.json` from being a byte-level BPE of this class, if anything.

    Args:
        special_ids: of an imported one; None = it must be one of ours.
    """
    try:
        content = json.loads(text)
        model, added = content["model"], content["added_tokens"]
        names = {token["id"]: token["content"] for token in added}
        vocab = set(model["vocab"])
        kind = model["type"]
    except (ValueError, KeyError, TypeError) as error:
        return f"damaged: {type(error).__name__} {error}"
    if kind != "BPE":
        return f"model {kind}"
    missing = set(_byte_characters().values()) - vocab
    if special_ids is None:
        specials = tuple(names[token_id] for token_id in sorted(names))
        if specials not in (SPECIAL_TOKENS, MARK_TOKENS):
            return f"special tokens {', '.join(specials)}"
    elif normalizer := _changing_normalizer(content):
        return f"normalizer {normalizer}"
    elif "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        return "no ByteLevel pre-tokenizer"
    elif unknown := {special_ids.bos_id, *special_ids.eos_ids, special_ids.pad_id} - {*names, *model["vocab"].values()}:
        return f"special id {min(unknown)} has no token"
    return f"{len(missing)} bytes have no token" if missing else None


def _changing_normalizer(content: dict[str, Any]) -> str | None:
    """Return the kind of a normalizer that changes more than how characters are composed, if there is one."""
    normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return next((str(part["type"]) for part in parts if part["type"] != "NFC"), None)


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte, in which byte-level vocabularies are written."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Return the bytes of every id: none for special tokens and for ids that no token has.

    Tokens that were added to a vocabulary but are not special, such as `<think>`, stand for their own text.
    """
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    added = tokenizer.get_added_tokens_decoder()
    names = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    table = [b""] * (max(names) + 1)
    for i, name in names.items():
        if i not in added:
            table[i] = bytes(byte_of[character] for character in name)
        elif not added[i].special:
            table[i] = added[i].content.encode()
    return tuple(table)
