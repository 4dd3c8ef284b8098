"""Addresses are masked; what only looks like one is not."""

import pytest

from ray_ds.data.pii import mask_pii


@pytest.mark.shows("E-mail addresses, IP addresses and phone numbers are masked")
@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+news@mail.example.co.uk.", "write to <EMAIL>."),
        ("邮箱abc@example.com，谢谢", "邮箱<EMAIL>，谢谢"),
        ("the host 93.184.216.34 answered", "the host <IP> answered"),
        ("at 2001:4860:4860::8888 today", "at <IP> today"),
        ("call (415) 555-2671 or 415-555-2671", "call <PHONE> or <PHONE>"),
        ("call +44 20 7946 0958 now", "call <PHONE> now"),
        ("电话13912345678，或010-62345678。", "电话<PHONE>，或<PHONE>。"),
        ("客服400-820-8820转1", "客服<PHONE>转1"),
        ("手机 139 1234 5678", "手机 <PHONE>"),
    ],
)
def test_addresses_are_masked_once(text: str, masked: str) -> None:
    assert mask_pii(text).text == masked
    assert mask_pii(masked).text == masked


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png and @pytest.fixture",
        "a @ b.T in numpy",
        "private 192.168.1.20 and 127.0.0.1 and 300.1.2.3",
        "version 2.31.44.7 of it, v1.22.33.44, ==1.26.99.4",
        "as in section 3.1.12.5 of the text",
        "版本 4.28.77.12 已发布",
        "std::vector and dead::beef at 12:30:45",
        "on 2024-01-15, 2024-01-15T10:20:30, pages 110-124",
        "order 12345678901, ISBN 978-0-306-40615-7, pi 3.14159265358979",
        "11 digits 12012345678 of no operator",
        "1 234 567 890 bytes, 10000000000 in all",
        "see https://example.com/a/415-555-2671",
    ],
)
def test_lookalikes_are_left_alone(text: str) -> None:
    assert mask_pii(text).text == text


def test_masks_are_counted() -> None:
    masked = mask_pii("a@example.com b@example.com 93.184.216.34 13912345678 13812345678")
    assert (masked.num_emails, masked.num_ips, masked.num_phones) == (2, 1, 2)
