"""Prompts as templates: what is filled in, what passes untouched, and what never reaches a provider."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import TemplateError
from llmkit.notebook import template
from llmkit.notebook.template import render


def failure(text, **names):
    with pytest.raises(TemplateError) as caught:
        render(text, names)
    return caught.value


def test_names_are_filled_in_and_later_namespaces_win() -> None:
    assert render("{{ a }} {{ b }}", {"a": 1, "b": 1}, {"b": 2}) == "1 2"


def test_expressions_filters_and_loops_work() -> None:
    text = "{% for x in xs %}{{ loop.index }}:{{ x | upper }} {% endfor %}{{ len(xs) }}"
    assert render(text, {"xs": ["a", "b"]}) == "1:A 2:B 2"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"b": 1}}',
        "def f(): return {1: {2: 3}}",
        "f'{x}' $x ${x} %(x)s {0}",
        "{# not a comment #}",
        "a }} b %} c",
        "trailing\n",
    ],
)
def test_other_braces_pass_untouched(text) -> None:
    assert render(text, {"x": 3}) == text
    assert render(text + "{{ x }}", {"x": 3}) == text + "3"


def test_what_a_variable_holds_is_never_scanned_again() -> None:
    assert render("{{ x }}", {"x": "{{ y }} {% z %} {# c #}"}) == "{{ y }} {% z %} {# c #}"


@given(st.text(alphabet='{}%#"$ab\n '))
def test_any_value_arrives_as_it_is(value) -> None:
    assert render("<{{ x }}>", {"x": value}) == f"<{value}>"


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("ab"), inner), max_leaves=5))
def test_json_passes_untouched(value) -> None:
    text = json.dumps(value)
    if "{{" not in text and "{%" not in text:
        assert render(text, {}) == text


def test_a_missing_name_is_an_error_that_names_it() -> None:
    error = failure("one\n{{ tabel }}", table=1)
    assert error.name == "tabel"
    assert error.message == "line 2 of the prompt: tabel is not defined in this notebook; did you mean table?"


def test_a_missing_name_may_be_asked_about() -> None:
    assert render("{{ x | default('none') }} {{ x is defined }}", {}) == "none False"


def test_a_missing_attribute_names_it() -> None:
    error = failure("{{ x.colour }}", x={"color": 1})
    assert error.name == "colour"
    assert "has no attribute 'colour'" in error.message


@pytest.mark.parametrize(
    "text",
    ["{{ x.__class__ }}", "{{ x|attr('__class__') }}", "{{ '{0.__class__}'.format(x) }}", "{{ x['__class__'] }}"],
)
def test_nothing_reaches_into_python(text) -> None:
    assert failure(text, x="s").name == "__class__"


@pytest.mark.parametrize("text", ["{{ x", "{% if x %}", "{{ x | nofilter }}", "{% endfor %}", "a\n{{ }}"])
def test_wrong_syntax_names_the_line(text) -> None:
    error = failure(text, x=1)
    assert f"line {1 + text.count(chr(10))} of the prompt" in error.message
    assert "--raw" in error.next_step


def test_an_error_in_an_expression_is_ours() -> None:
    error = failure("\n{{ 1 / zero }}", zero=0)
    assert error.message == "line 2 of the prompt: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "text", ["{% include 'x' %}", "{{ lipsum() }}", "{{ open('/etc/passwd') }}", "{{ eval('1') }}"]
)
def test_there_is_nothing_but_the_notebook(text) -> None:
    failure(text)


def test_the_result_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(template, "MAX_CHARACTERS", 100)
    assert "longer than 100 characters" in failure("{% for i in range(1000) %}x{% endfor %}").message
    assert len(render("{{ 'x' * 100 }}", {})) == 100


def test_an_interrupt_stays_an_interrupt() -> None:
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render("{{ stop() }}", {"stop": stop})
