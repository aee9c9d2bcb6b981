"""What an answer goes out as."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.notebook import formats
from llmkit.notebook.formats import bundle, plain

HOSTILE = "<script>alert(1)</script>\x1b]0;title\x07\x1b[31mred\x1b[0m\x00\x08 ok\r\n\ttab\x9b2J"


@pytest.mark.parametrize("form", ["markdown", "text", "json", "code", "html"])
def test_a_models_text_is_never_html(form) -> None:
    data = bundle(HOSTILE, form)
    assert set(data) <= {"text/markdown", "text/plain"}
    assert data["text/plain"] == "<script>alert(1)</script>red ok\n\ttab2J"


@given(st.text())
def test_plain_text_holds_nothing_that_a_terminal_obeys(text) -> None:
    assert not set(plain(text)) & {chr(code) for code in [*range(9), *range(11, 32), *range(127, 160)]}


def test_markdown_goes_out_as_it_is() -> None:
    assert bundle("a *b*\n", "markdown") == {"text/markdown": "a *b*\n", "text/plain": "a *b*\n"}


def test_text_is_not_rendered() -> None:
    assert bundle("a *b*", "text") == {"text/plain": "a *b*"}


@pytest.mark.parametrize("text", ['{"a":[1,"é"]}', '```json\n{"a":[1,"é"]}\n```', ' {"a": [1, "é"]}\n'])
def test_json_is_indented(text) -> None:
    data = bundle(text, "json")
    assert data["text/plain"] == json.dumps({"a": [1, "é"]}, indent=2, ensure_ascii=False)
    assert data["text/markdown"] == f"```json\n{data['text/plain']}\n```"


@pytest.mark.parametrize("text", ["not json", "{", "[" * 100_000, "```\nno\n```\nand ```\nmore\n```"])
def test_what_is_no_json_is_shown_as_it_is(text) -> None:
    assert plain(text.strip("`\n")) in bundle(text, "json")["text/plain"]


def test_long_json_is_not_parsed(monkeypatch) -> None:
    monkeypatch.setattr(formats, "MAX_JSON", 5)
    assert bundle("[1,2,3]", "json")["text/plain"] == "[1,2,3]"


def test_code_is_fenced_unless_it_is_already() -> None:
    assert bundle("x = 1\n", "code")["text/markdown"] == "```\nx = 1\n```"
    assert bundle("```python\nx = 1\n```", "code")["text/markdown"] == "```python\nx = 1\n```"


def test_html_is_shown_as_source_and_cannot_leave_its_fence() -> None:
    assert bundle("<b>x</b>\n```\n<script>", "html")["text/markdown"] == "````html\n<b>x</b>\n```\n<script>\n````"


D = "<span>&#36;</span>"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("costs $5 and $10", f"costs {D}5 and {D}10"),
        ("| $5 | $10 |", f"| {D}5 | {D}10 |"),
        ("- a: $5\n- b: $10", f"- a: {D}5\n- b: {D}10"),
        ("$5-$10", f"{D}5-{D}10"),
        ("$5 a month, or US$ 6", f"{D}5 a month, or US{D} 6"),
        ("one $ only", "one $ only"),
        ("$x^2$ costs $5 or $6", f"$x^2$ costs {D}5 or {D}6"),
        ("$5$ and $2 x + 1$ and $n$", "$5$ and $2 x + 1$ and $n$"),
        ("`$5 $6` and $7 or $8", f"`$5 $6` and {D}7 or {D}8"),
        ("``a ` $5`` $6", f"``a ` $5`` {D}6"),
        ("```sh\necho $A $B\n```\n$5 $6", f"```sh\necho $A $B\n```\n{D}5 {D}6"),
        ("~~~\n$A ```\n$B", "~~~\n$A ```\n$B"),
        ("$$\na $ b\n$$\n$5 $6", f"$$\na $ b\n$$\n{D}5 {D}6"),
        (r"\$5 $6 $7", rf"\$5 {D}6 {D}7"),
    ],
)
def test_prices_are_no_formulas(text, shown) -> None:
    assert bundle(text, "markdown") == {"text/markdown": shown, "text/plain": text}


@given(st.text(alphabet="$`~\\\n a1x|"))
def test_dollars_are_only_ever_replaced(text) -> None:
    assert bundle(text, "markdown")["text/markdown"].replace(D, "$") == text
