"""Mask e-mail addresses, IP addresses and phone numbers: patterns find candidates, checks decide."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

EMAIL_MASK = "<EMAIL>"
IP_MASK = "<IP>"
PHONE_MASK = "<PHONE>"

# Borders are spelled out in ASCII: for Python, Chinese characters are \w, so \b would miss 邮箱abc@example.com.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_NOT_DOMAINS = frozenset(
    ["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "py", "so", "dll", "whl"]
)
"""Endings of file names such as icon@2x.png."""
_IPV4 = re.compile(r"(?<![A-Za-z0-9._-])(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_-]|\.\d)")
_IPV6 = re.compile(r"(?<![A-Za-z0-9:._])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9:._]*[A-Za-z0-9:])")
_VERSION_BEFORE = re.compile(
    r"(?:\bv|\bver\.?|version|release|revision|section|版本|版|第|[=<>~^!]=|[=~^]|(?<![A-Z])[<>]|[/@-])\s*$", re.I
)
_LARGEST_VERSION_PART = 19
"""An IPv4 address with no part above this reads as a version or section number; one random address in 27,000 does."""
_PHONE = re.compile(
    r"(?<![A-Za-z0-9._+/=-])(?:"
    r"(?P<international>\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5})"
    r"|(?P<american>(?:1[-. ])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-.])[2-9]\d{2}[-.]\d{4})"
    r"|(?P<mobile>1[3-9]\d(?:[ -]?\d{4}){2})"
    r"|(?P<landline>(?:0\d{2,3}-[2-8]\d{6,7}|\(0\d{2,3}\) ?[2-8]\d{6,7}|[48]00-\d{3,4}-\d{3,4}))"
    r")(?![A-Za-z0-9_/=-]|[.,]\d)"
)
_CHINESE_MOBILE = re.compile(r"1(?:3\d|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])")
"""Prefixes that are in use."""
_INTERNATIONAL_DIGITS = range(9, 16)
"""E.164 allows 15 digits; fewer than 9 with a country code are mostly arithmetic."""


@dataclass(frozen=True, slots=True)
class Masked:
    """A text without addresses, and how many were masked."""

    text: str
    num_emails: int
    num_ips: int
    num_phones: int


def mask_pii(text: str) -> Masked:
    """Return the text with addresses masked. Masking a masked text changes nothing."""
    num_emails = num_ips = num_phones = 0
    if "@" in text:
        text, num_emails = _replace(_EMAIL, text, EMAIL_MASK, _is_email)
    if "." in text:
        text, num_ips = _replace(_IPV4, text, IP_MASK, _is_personal_ipv4)
    if ":" in text:
        text, num_ipv6 = _replace(_IPV6, text, IP_MASK, _is_ipv6)
        num_ips += num_ipv6
    text, num_phones = _replace(_PHONE, text, PHONE_MASK, _is_phone)
    return Masked(text, num_emails, num_ips, num_phones)


def find_pii(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of what `mask_pii` masks, of each kind in turn."""
    rules = ((_EMAIL, _is_email), (_IPV4, _is_personal_ipv4), (_IPV6, _is_ipv6), (_PHONE, _is_phone))
    return [match.span() for pattern, is_meant in rules for match in pattern.finditer(text) if is_meant(match)]


def _replace(
    pattern: re.Pattern[str], text: str, mask: str, is_meant: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    count = 0

    def put_mask(match: re.Match[str]) -> str:
        nonlocal count
        if not is_meant(match):
            return match[0]
        count += 1
        return mask

    return pattern.sub(put_mask, text), count


def _is_email(match: re.Match[str]) -> bool:
    return match[1].lower() not in _NOT_DOMAINS and ".." not in match[0]


def _is_personal_ipv4(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.IPv4Address(match[0])
    except ipaddress.AddressValueError:
        return False
    if not address.is_global or address.is_multicast or max(address.packed) <= _LARGEST_VERSION_PART:
        return False
    return _VERSION_BEFORE.search(match.string[max(match.start() - 16, 0) : match.start()]) is None


def _is_ipv6(match: re.Match[str]) -> bool:
    try:
        return ipaddress.IPv6Address(match[0]).is_global
    except ipaddress.AddressValueError:
        return False


def _is_phone(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if match["international"]:
        return len(digits) in _INTERNATIONAL_DIGITS
    if match["mobile"]:
        return _CHINESE_MOBILE.match(digits) is not None
    return True
