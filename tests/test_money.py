"""USD as people read them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmkit.money import amount, money


@pytest.mark.parametrize(
    "usd, text",
    [
        ("0", "$0"),
        ("0.000000001", "$0.000000001"),
        ("0.00002425", "$0.0000242"),
        ("0.000481", "$0.000481"),
        ("0.0012", "$0.0012"),
        ("0.0123456", "$0.0123"),
        ("1234.5", "$1,234.50"),
    ],
)
def test_money(usd, text) -> None:
    assert money(Decimal(usd)) == text


@pytest.mark.parametrize(
    "usd, text",
    [
        ("5", "$5"),
        ("20.00", "$20"),
        ("0.5", "$0.50"),
        ("1000", "$1,000"),
        ("1E+3", "$1,000"),
        ("0.000001", "$0.000001"),
        ("1.234", "$1.234"),
    ],
)
def test_what_was_set_is_said_as_it_was_set(usd, text) -> None:
    assert amount(Decimal(usd)) == text
