"""The forms of commands, as help shows them, read as a grammar."""

from __future__ import annotations

import pytest

from llmkit.notebook.forms import Slot, fits, following, slots


def test_a_form_is_read() -> None:
    assert slots("%llm") == slots("%llm models") == ()
    assert slots("%llm report [day|model] [SINCE]") == (
        Slot(("day", "model"), optional=True),
        Slot(kind="SINCE", optional=True),
    )
    assert slots("%llm export PATH [--overwrite]") == (Slot(kind="PATH"), Slot(("--overwrite",), optional=True))
    assert slots("%llm use MODEL[,FALLBACK…]") == (Slot(kind="MODEL"),)
    assert slots("%llm budget NAME=AMOUNT …") == (Slot(kind="NAME=AMOUNT", repeated=True),)
    assert slots("%llm x [reset [ENDPOINT]]") == (Slot(("reset",), optional=True), Slot(kind="ENDPOINT", optional=True))


@pytest.mark.parametrize(
    "form, words, expected",
    [
        ("%llm models", "", True),
        ("%llm models", "x", False),
        ("%llm report [day|model] [SINCE]", "", True),
        ("%llm report [day|model] [SINCE]", "7d", True),
        ("%llm report [day|model] [SINCE]", "model 7d", True),
        ("%llm report [day|model] [SINCE]", "modle", False),
        ("%llm report [day|model] [SINCE]", "7d model", False),
        ("%llm calls [N]", "ten", False),
        ("%llm export PATH [--overwrite]", "", False),
        ("%llm export PATH [--overwrite]", "a.csv --overwrite", True),
        ("%llm budget NAME=AMOUNT …", "day=1usd month=2usd", True),
        ("%llm budget NAME=AMOUNT …", "", False),
        ("%llm budget NAME=AMOUNT …", "day=1usd month", False),
        ("%llm chat NAME clear", "trip clear", True),
        ("%llm chat NAME clear", "clear", False),
    ],
)
def test_words_fit_a_form_or_do_not(form, words, expected) -> None:
    assert fits(form, words.split()) is expected


def test_what_may_follow() -> None:
    written = ["%llm cache", "%llm cache clear", "%llm cache off|on"]
    assert following(written, []) == [Slot(("clear",)), Slot(("off", "on"))]
    assert following(written, ["clear"]) == []
    assert following(["%llm report [day|model] [SINCE]"], []) == [
        Slot(("day", "model"), optional=True),
        Slot(kind="SINCE", optional=True),
    ]
    assert following(["%llm budget NAME=AMOUNT …"], ["day=1"]) == [
        Slot(kind="NAME=AMOUNT", optional=True, repeated=True)
    ]
