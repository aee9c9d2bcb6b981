"""The filters of prompts: JSON, tokens, and what Jinja's own would write for web pages."""

from __future__ import annotations

import json

import pytest

from llmkit.errors import TemplateError
from llmkit.models.tokens import estimate
from llmkit.notebook.filters import FILTERS
from llmkit.notebook.template import render


def test_json_is_indented_and_keeps_characters() -> None:
    assert render("{{ x | json }}", {"x": {"ä": "<b>&'"}}) == '{\n  "ä": "<b>&\'"\n}'
    assert render("{{ x | json(indent=none) }}", {"x": [1, {"a": 2}]}) == '[1, {"a": 2}]'
    with pytest.raises(TemplateError, match="indent is a whole number from 0 to 8"):
        render("{{ x | json(99) }}", {"x": 1})


def test_tojson_does_not_write_for_web_pages() -> None:
    assert render("{{ x | tojson }}", {"x": {"a": "<b> & 'c'"}}) == '{"a": "<b> & \'c\'"}'


def test_tokens_are_those_of_what_would_be_written() -> None:
    assert render("{{ x | tokens }}", {"x": "word " * 100}) == str(estimate("word " * 100))
    assert render("{{ x | tokens }}", {"x": {"a": 1}}) == str(estimate('{"a": 1}'))


@pytest.mark.parametrize("limit", [1, 7, 100, 1000])
def test_a_text_is_cut_at_so_many_tokens_and_says_so(limit) -> None:
    text = "Some words of a report, and 中文, and 17.5 % of it. " * 300
    kept, _, note = render(f"{{{{ x | truncate_tokens({limit}) }}}}", {"x": text}).rpartition("\n")
    assert note == f"(the first {limit:,} of about {estimate(text):,} tokens)"
    assert text.startswith(kept)
    assert estimate(kept) <= limit
    assert limit < 50 or estimate(kept) > 0.8 * limit


def test_a_short_text_stays_whole() -> None:
    assert render("{{ x | truncate_tokens(500) }}", {"x": "as it is\n"}) == "as it is\n"


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "'x'", "true"])
def test_a_limit_is_a_whole_number(limit) -> None:
    with pytest.raises(TemplateError, match="the limit is a whole number from 1"):
        render(f"{{{{ 'x' | truncate_tokens({limit}) }}}}")


def test_every_filter_may_be_called_on_text() -> None:
    for name in FILTERS.keys() - {"table", "csv", "truncate_tokens"}:
        assert json.loads(render(f"{{{{ 'x' | {name} }}}}")) in ("x", 1)
