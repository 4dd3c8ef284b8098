"""The files of a tokenizer, which go together from artefact to artefact."""

from ray_ds import storage

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_IDS_FILE = "special_ids.json"
"""Which ids an imported tokenizer has for the start and the end of a text; ours has no such file."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
"""Hugging Face's: names of special tokens, the class, often the chat template."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    SPECIAL_IDS_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    CHAT_TEMPLATE_FILE,
)


def copy_tokenizer(source: str, target: str, *, with_template: bool = True) -> None:
    """Copy those of `TOKENIZER_FILES` that a folder has into another; both are absolute paths or URIs.

    Args:
        with_template: whether the chat template goes along.
    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
    """
    storage.write_bytes(storage.join(target, TOKENIZER_FILE), storage.read_bytes(storage.join(source, TOKENIZER_FILE)))
    for name in TOKENIZER_FILES[1:]:
        if name == CHAT_TEMPLATE_FILE and not with_template:
            continue
        if storage.exists(storage.join(source, name)):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))
