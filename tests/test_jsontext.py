"""The one JSON value in an answer: what is found, and what is not taken for one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.jsontext import DEEPEST, NoValue, value_in

ANA = {"name": "Ana", "age": 3}
JSON = json.dumps(ANA)


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"\n\n  {JSON}  \n",
        f"```json\n{JSON}\n```",
        f"```\n{JSON}\n```",
        f"```{JSON}```",
        f"Sure! Here it is:\n```json\n{JSON}\n```\nAnything else?",
        f"Sure: {JSON}.",
        f"The {{placeholder}} is filled in as {JSON}",
        f"As in [1] and [2]: {JSON}",
        f'<think>maybe {{"name": "Bob"}}?</think>\n{JSON}',
        f'{JSON}\n\nNote that "age" is a guess {{sic}}.',
    ],
)
def test_what_stands_round_a_value_is_left_out(text) -> None:
    assert value_in(text, "{").value == ANA


def test_a_whole_pair_of_surrogates_is_a_character() -> None:
    assert value_in(r'{"a": "\ud83d\ude00"}').value == {"a": "\U0001f600"}


def test_lists_and_plain_values() -> None:
    assert value_in("[1, 2]").value == [1, 2]
    assert value_in("Here: [1, 2]").value == [1, 2]
    assert value_in("42").value == 42
    assert value_in('"x"').value == "x"
    assert value_in("null").value is None


def test_the_text_of_the_value_is_kept_as_it_was_written() -> None:
    assert value_in('so {"price": 0.10000000000000000001}.').text == '{"price": 0.10000000000000000001}'


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no text"),
        ("I cannot say.", "there is none"),
        (f"{JSON} or {JSON}", "more than one"),
        (f"```json\n{JSON}\n```\nor\n```json\n{JSON}\n```", "more than one"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "Infinity is no JSON number"),
        ('{"a": 1e999}', "too large"),
        ('so {"a": NaN}', "NaN is no JSON number"),
        ('so {"a": 1, "a": 2}', "stands twice"),
        ("{'a': 1}", "line 1, column 2"),
        (r'{"a": "\ud83d"}', "half a character"),
        (r'so {"a": "\uDE00\uD83D"}.', "half a character"),
        ('{"a": 1,\n}', "line [12]"),  # Pythons differ in what they think is wrong: the comma, or the brace behind it
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        (f"{'[' * (DEEPEST + 1)}{']' * (DEEPEST + 1)}", "deeper than"),
        ('{"a": ' + "9" * 5000 + "}", "a number is too long"),
    ],
)
def test_what_is_no_value_is_said(text, said) -> None:
    with pytest.raises(NoValue, match=said):
        value_in(text, "{")


@pytest.mark.parametrize(
    "text", ['{"a": {"name": "Bob"}, "b": ', '[{"name": "Bob"}, {"na', '{"a": {"name": "Bob"} oops}', '{"a": [{"b": 1}']
)
def test_a_part_of_a_value_that_breaks_off_is_not_taken_for_it(text) -> None:
    with pytest.raises(NoValue):
        value_in(text, "{")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_every_json_value_is_found_as_it_is(value) -> None:
    assert value_in(json.dumps(value)).value == value
    assert value_in(json.dumps(value, ensure_ascii=False, indent=1)).value == value


@given(st.text())
def test_any_text_ends_in_a_value_or_in_one_sentence(text) -> None:
    try:
        value_in(text)
    except NoValue as error:
        assert str(error)


@pytest.mark.parametrize(
    "text", ["{" * 1_000_000, '{"a' * 300_000, '{"a": 1} ' * 200_000, "{x} " * 300_000, "```" * 300_000]
)
def test_a_hostile_text_comes_to_an_end(text) -> None:
    with pytest.raises(NoValue):
        value_in(text)
