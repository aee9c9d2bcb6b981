"""Personal data as it looks in a text: e-mail addresses, telephone numbers, card and account numbers, IP addresses, SSNs.

What has a check digit is checked, so that order numbers stay. A telephone number is taken for one where it is written as
such: with a ``+``, with brackets, or in groups. Names of people cannot be told from other words, and stay.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["personal"]

_LONGEST_EMAIL = 64
_DATE = re.compile(  # perhaps with its time
    r"(?:\d{4}-\d{2}-|(?:19|20)\d\d([/ ])(?:0\d|1[0-2])\1)\d{2}.*|\d{1,2}[./-]\d{1,2}[./-]\d{4}.*", re.DOTALL
)
_FEWEST_DIGITS, _MOST_DIGITS = 9, 15  # of a telephone number in groups (E.164 allows 15)


def personal(text: str) -> Iterator[tuple[int, int, str]]:
    """Where personal data stands in ``text``: (begin, end, what it is), those of one kind in their order."""
    for kind, pattern, holds in _KINDS:
        for match in pattern.finditer(text):
            if holds(match.group()):
                yield (*match.span(), f"[{kind}]")


def _digits(text: str) -> list[int]:
    return [int(each) for each in text if each.isascii() and each.isdigit()]


def _is_card(text: str) -> bool:
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [each * 2 - 9 * (each > 4) for each in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    plain = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(each, 36)) for each in plain[4:] + plain[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    if not re.search(r"\d", text):  # a::b is code
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    if _DATE.fullmatch(text):
        return False
    return _FEWEST_DIGITS <= len(_digits(text)) <= _MOST_DIGITS


def _is_ssn(text: str) -> bool:
    area, group, serial = text.split(text[3])
    return area not in {"000", "666"} and area < "900" and group != "00" and serial != "0000"


def _always(_: str) -> bool:
    return True


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "e-mail",
        re.compile(rf"(?<![\w.%+-])[\w.%+-]{{1,{_LONGEST_EMAIL}}}@(?:[\w-]{{1,63}}\.){{1,8}}[^\W\d_]{{2,24}}(?![\w-])"),
        _always,
    ),
    (
        "IBAN",
        re.compile(
            r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?(?![A-Za-z0-9])"
        ),
        _is_iban,
    ),
    ("card", re.compile(r"(?<![\w.-])\d(?:(?: ?\d){12,18}|(?:-?\d){12,18})(?![\w-])"), _is_card),
    ("SSN", re.compile(r"(?<![\w-])\d{3}([- ])\d{2}\1\d{4}(?![\w-])"), _is_ssn),
    ("IP address", re.compile(r"(?<![\w.:])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"), _is_address),
    (
        "IP address",
        re.compile(r"(?<![\w.:])(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)?(?:%\w+)?(?![\w:])"),
        _is_address,
    ),
    ("phone", re.compile(r"(?<![\w.+-])\+\d(?:[ ./()-]{0,2}\d){7,14}(?!\d)"), _always),
    (
        "phone",
        re.compile(r"(?<![\w.+-])(?:\(\d{2,5}\)[ ./-]?|\d{2,5}[ /-])\d{2,5}(?:[ ./-]\d{2,5}){1,4}(?![\w-])"),
        _is_phone,
    ),
    ("phone", re.compile(r"(?<![\w.+-])0[1-9]\d{0,4}[ /-]\d{5,10}(?![\w-])"), _is_phone),  # 030 1234567
    ("phone", re.compile(r"(?<![\w.+-])00[1-9]\d{8,13}(?![\w.-]*\w)"), _always),  # 0049…
    ("phone", re.compile(r"(?<![\w.+-])[2-9]\d{2}\.[2-9]\d{2}\.\d{4}(?![\w-]|\.\d)"), _always),  # 555.234.4567
)
