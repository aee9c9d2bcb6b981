"""Prompts as templates: what is filled in, what passes untouched, and what never reaches a provider."""

from __future__ import annotations

import io
import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import TemplateError
from llmkit.notebook import template
from llmkit.notebook.sandbox import LARGEST, OUT_OF_REACH
from llmkit.notebook.template import render, render_parts


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


# -- what each expression puts in --------------------------------------------------------------------------------------


def test_the_parts_are_what_each_expression_put_in() -> None:
    text = "{{ a }} {% for x in xs %}{{ x | upper }}{% endfor %}{% if no %}{{ never }}{% endif %} {{ a }}"
    prompt, parts = render_parts(text, {"a": 1, "xs": ["p", "q"], "no": False})
    assert prompt == "1 PQ 1" == render(text, {"a": 1, "xs": ["p", "q"], "no": False})
    assert parts == [("a", "1"), ("x | upper", "PQ"), ("never", ""), ("a", "1")]


def test_a_text_that_is_no_template_has_no_parts() -> None:
    assert render_parts('{"a": 1}') == ('{"a": 1}', [])
    assert render_parts("{% raw %}{{ a }}{% endraw %}") == ("{{ a }}", [])


def test_constants_and_macros_are_parts_too() -> None:
    text = "{% macro m(v) %}<{{ v }}>{% endmacro %}{{ m('x') }}{{ 6 * 7 }}{{- 'y' -}} "
    assert render_parts(text) == ("<x>42y", [("v", "x"), ("m('x')", "<x>"), ("6 * 7", "42"), ("'y'", "y")])


def test_statements_that_say_several_things_are_named_by_their_line() -> None:
    assert render_parts("\n{% print 1, 2 %}") == ("\n12", [("line 2", "1"), ("line 2", "2")])


def test_a_template_used_again_starts_afresh() -> None:
    for value in ("a", "b"):
        assert render_parts("{{ x }}", {"x": value}) == (value, [("x", value)])


# -- values are never scanned again ------------------------------------------------------------------------------------

SECRET = "{{ secrets }} {% for x in y %}"


@pytest.mark.parametrize(
    "text",
    [
        "{{ x }}",
        "{{ x | trim }}",
        "{{ [x] | join }}",
        "{% macro m(v) %}{{ v }}{% endmacro %}{{ m(x) }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ x }}{% endcall %}",
        "{% set y %}{{ x }}{% endset %}{{ y }}",
        "{% filter trim %}{{ x }}{% endfilter %}",
        "{{ x | truncate_tokens(1000) }}",
    ],
)
def test_a_value_with_template_syntax_goes_out_as_it_is(text) -> None:
    assert render(text, {"x": SECRET, "secrets": "no"}) == SECRET


def test_so_do_the_values_in_tables_and_in_json() -> None:
    assert SECRET in render("{{ [{'c': x}] | table }}", {"x": SECRET, "secrets": "no"})
    assert json.loads(render("{{ {'c': x} }}", {"x": SECRET, "secrets": "no"})) == {"c": SECRET}


# -- the sandbox -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{{ os.environ }}",
        "{{ os['environ'] }}",
        "{{ environ['HOME'] }}",
        "{{ environ.get('HOME') }}",
        "{{ environ }}",
        "{{ system('true') }}",
        "{{ run(['true']) }}",
        "{{ sys.stdout.write('x') }}",
        "{{ stdout.write('x') }}",
        "{{ Path('/etc/passwd').read_text() }}",
        "{{ path.read_text() }}",
        "{{ path.unlink() }}",
        "{{ e('1') }}",
        "{{ o('/etc/passwd') }}",
        "{{ shell.system('true') }}",
        "{{ Client() }}",
        "{{ client.complete('spend') }}",
        "{{ xs.append(3) }}",
        "{{ d.update(a=2) }}",
        "{% set xs.a = 1 %}",
        "{{ f.__globals__ }}",
        "{{ f.__code__ }}",
    ],
)
def test_no_template_reaches_the_machine_or_changes_a_variable(text, bare) -> None:
    import llmkit

    class Own:
        def __init__(self) -> None:
            self.changed = False

    with llmkit.Client(model="simulator") as client:
        names = {
            "os": os,
            "environ": os.environ,
            "system": os.system,
            "run": subprocess.run,
            "sys": sys,
            "stdout": sys.__stdout__,
            "Path": pathlib.Path,
            "path": pathlib.Path("/etc/passwd"),
            "e": eval,
            "o": open,
            "shell": bare,
            "Client": llmkit.Client,
            "client": client,
            "xs": [1],
            "d": {"a": 1},
            "f": failure,
        }
        failure(text, **names)
    assert (names["xs"], names["d"]) == ([1], {"a": 1})


def test_what_is_harmless_may_be_used() -> None:
    names = {"statistics": statistics, "path": pathlib.Path("a/b.txt"), "buffer": io.StringIO("held"), "f": lambda: 3}
    text = "{{ statistics.mean([1, 3]) }} {{ path.name }} {{ buffer.getvalue() }} {{ f() }} {{ path }}"
    assert render(text, names) == f"2 b.txt held 3 {pathlib.Path('a/b.txt')}"
    assert "statistics" not in OUT_OF_REACH


@pytest.mark.parametrize(
    "text", ["{{ 'x' * n }}", "{{ n * [1] }}", "{{ 9 ** n }}", "{{ range(n) | list }}", "{{ ring }}"]
)
def test_what_would_never_end_is_refused(text) -> None:
    ring: list = []
    ring.append(ring)
    assert failure(text, n=LARGEST * 10, ring=ring).message.startswith("line 1 of the prompt: ")


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unknown_filter_names_the_nearest() -> None:
    assert (
        failure("{{ x | tabel }}", x=1).message == "line 1 of the prompt: there is no filter tabel; did you mean table?"
    )
    assert "there is no test evne; did you mean even?" in failure("{{ x is evne }}", x=1).message


def test_wrong_arguments_of_a_filter_show_the_right_ones() -> None:
    error = failure("\n{{ x | table(1, 2, 3) }}", x=[{"a": 1}])
    assert error.message == "line 2 of the prompt: the filter table: too many positional arguments"
    assert error.next_step == "write it as {{ value | table(rows=100, columns=50) }}"
    assert "rows is a whole number from 0" in failure("{{ x | table('all') }}", x=[]).message


def test_a_missing_name_is_named_before_any_filter_sees_it() -> None:
    for name in ("table", "json", "csv", "tokens", "truncate_tokens(3)"):
        assert failure(f"{{{{ tabel | {name} }}}}", table=1).name == "tabel"
    assert failure("{{ [tabel] }}", table=1).name == "tabel"


@pytest.mark.parametrize("tag", ["include 'x'", "import 'x' as y", "from 'x' import y", "extends 'x'"])
def test_other_files_are_not_taken_in(tag) -> None:
    with pytest.raises(TemplateError, match=r"line 2 of the prompt: .*a prompt takes in no other file") as caught:
        render(f"first\n{{% {tag} %}}")
    assert "--raw" in caught.value.next_step


def test_what_the_shell_put_there_is_not_what_was_meant() -> None:
    assert failure("{{ nope }}", open=open, quit=quit).message == (
        "line 1 of the prompt: nope is not defined in this notebook"
    )
    assert failure("{{ nope }}", open=open, nopes=1).message.endswith("did you mean nopes?")
