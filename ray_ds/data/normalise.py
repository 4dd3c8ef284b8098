"""Mend and even out text: mojibake, Unicode form, line ends, invisible characters."""

import re

import ftfy

_CONFIG = ftfy.TextFixerConfig(
    fix_character_width=False,  # it would turn full-width Chinese punctuation into ASCII
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    normalization="NFC",
    explain=False,
)
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\ufffe\uffff]")
"""Soft hyphen, zero-width space, word joiner, byte-order mark. The joiners U+200C and U+200D carry meaning and stay."""
_LINE_END_SPACE = re.compile(r"[^\S\n]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalise_text(text: str) -> str:
    """Return mended text in NFC, with `\\n` line ends, no trailing white space and at most one blank line in a row."""
    fixed = ftfy.fix_text(text, _CONFIG)
    visible = _INVISIBLE.sub("", fixed).replace("\u00a0", " ")
    lines = _LINE_END_SPACE.sub("\n", visible)
    return _BLANK_LINES.sub("\n\n", lines).strip()
