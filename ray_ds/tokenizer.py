"""Byte-level BPE: train, load, encode, decode. Any string goes through it and comes back unchanged."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ray_ds import storage
from ray_ds.config.tokenizer import MIN_VOCAB_SIZE
from ray_ds.errors import ArtifactError, InputError

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
"""Their ids are their places here: 0, 1, 2."""

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


class BpeTokenizer:
    """A byte-level BPE with special tokens `<|bos|>`, `<|eos|>`, `<|pad|>`; ids are below `vocab_size`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Text that spells a special token is text: otherwise a document could end itself.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.bos_id, self.eos_id, self.pad_id = range(len(SPECIAL_TOKENS))
        self._token_bytes = _token_bytes(tokenizer, self.vocab_size)
        self.special_ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        """Ids of the tokens that no text is encoded to, by their names."""

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

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens have none; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids, which may start and end within a character."""
        return b"".join(map(self._token_bytes.__getitem__, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one id stands for; none for a special token."""
        return self._token_bytes[token_id]

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

    Raises:
        ArtifactError: the file is missing, or is no byte-level BPE with our special tokens.
    """
    if not storage.exists(uri):
        raise ArtifactError(uri, "missing", "must be a tokenizer.json", "run the tokenizer step")
    text = storage.read_bytes(uri).decode("utf-8", errors="replace")
    problem = _find_problem(text)
    if problem:
        raise ArtifactError(uri, problem, "must be a byte-level BPE made by the tokenizer step", "run that step again")
    return BpeTokenizer(Tokenizer.from_str(text))


def _find_problem(text: str) -> str | None:
    """Say what is wrong with the content of a `tokenizer.json`, if anything."""
    try:
        content = json.loads(text)
        model, added = content["model"], content["added_tokens"]
        specials = tuple(token["content"] for token in sorted(added, key=lambda token: token["id"]))
        vocab = set(model["vocab"])
        kind = model["type"]
    except (ValueError, KeyError, TypeError) as error:
        return f"damaged: {type(error).__name__} {error}"
    if kind != "BPE":
        return f"model {kind}"
    if specials != SPECIAL_TOKENS:
        return f"special tokens {', '.join(specials)}"
    missing = set(_byte_characters().values()) - vocab
    return f"{len(missing)} bytes have no token" if missing else None


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte, in which byte-level vocabularies are written."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _token_bytes(tokenizer: Tokenizer, vocab_size: int) -> tuple[bytes, ...]:
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    special = len(SPECIAL_TOKENS)
    names = [tokenizer.id_to_token(i) or "" for i in range(special, vocab_size)]
    assert all(names), "token ids have holes"
    return (b"",) * special + tuple(bytes(byte_of[character] for character in name) for name in names)
