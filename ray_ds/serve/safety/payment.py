"""Numbers that money is taken from: payment cards and bank accounts, told from other numbers by their check digits."""

import re

from ray_ds.serve.safety.finding import Finding

CATEGORY = "payment"

_CARD = re.compile(r"(?<![\d.,/-])(?:\d[ -]?){12,18}\d(?![\d/]|[.,-]\d)")
_CARD_PREFIXES = re.compile(r"(?:4|5[1-5]|2[2-7]|3[0689]|3[47]|6(?:011|4|5|2)|50|5[6-8]|67)")
"""Visa, Mastercard, Diners, American Express, Discover, UnionPay, Maestro. Source: public ranges of ISO/IEC 7812."""
_CARD_LENGTHS = (13, 14, 15, 16, 18, 19)

_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
_IBAN_LENGTHS = {
    **{"AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "BR": 29, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18},
    **{"EE": 20, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26},
    **{"IT": 27, "KW": 30, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28},
    **{"PT": 25, "QA": 29, "RO": 24, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26},
}
"""Characters by country. Source: the IBAN registry of ISO 13616."""

_BEGINNINGS = re.compile(r"(?:(?:\d[ -]?){1,19}|[A-Z]{1,2}|[A-Z]{2}\d{1,2}(?: ?[A-Z0-9]){0,32} ?)\Z")


class PaymentDetector:
    """Finds card numbers by Luhn's sum and IBANs by their remainder."""

    def find(self, text: str) -> list[Finding]:
        """Return the numbers of a text."""
        spans = [match.span() for match in _CARD.finditer(text) if _is_card(match[0])]
        for match in _IBAN.finditer(text):
            if (end := _iban_end(match)) is not None:
                spans.append((match.start(), end))
        return [Finding(category=CATEGORY, start=start, end=end) for start, end in spans]

    def undecided(self, text: str) -> int:
        """Return the start of the digits, or of the groups of an IBAN, that the text ends with."""
        match = _BEGINNINGS.search(text, max(0, len(text) - 80))
        return len(text) if match is None else match.start()


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    number = "".join(map(str, digits))
    if len(digits) not in _CARD_LENGTHS or not _CARD_PREFIXES.match(number) or len(set(digits)) == 1:
        return False
    doubled = [digit if i % 2 == 0 else sum(divmod(2 * digit, 10)) for i, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _iban_end(match: re.Match[str]) -> int | None:
    """Return where the IBAN at the start of a match ends; words in capitals may follow it."""
    length = _IBAN_LENGTHS.get(match[0][:2])
    places = [i for i, character in enumerate(match[0]) if character != " "]
    if length is None or len(places) < length:
        return None
    end = places[length - 1] + 1
    if end < len(match[0]) and match[0][end] != " ":
        return None
    iban = match[0][:end].replace(" ", "")
    number = int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4]))
    return match.start() + end if number % 97 == 1 else None
