"""Text is mended without hurting Chinese."""

from ray_ds.data.normalise import normalise_text


def test_text_is_mended() -> None:
    assert normalise_text("donâ€™t\r\n  stay \n\n\n\nlong\u200b\ufeff ") == "don’t\n  stay\n\nlong"
    assert normalise_text("cafe\u0301") == "café"
    assert normalise_text("bell\x07 and \x1b[31mred\x1b[0m") == "bell and red"


def test_chinese_punctuation_and_emoji_survive() -> None:
    text = "你好，世界！（测试）：“引号”。👩‍🔬"
    assert normalise_text(text) == text
    assert normalise_text(normalise_text(text)) == text
