"""The cell line: what it may hold, and the one error for what it may not."""

from __future__ import annotations

import pytest

from llmkit.errors import ConfigError
from llmkit.notebook.arguments import parse, parse_grid


def test_a_line_may_be_empty() -> None:
    line = parse("")
    assert (line.names, line.options, line.format) == ((), {}, None)
    assert line.stream
    assert not line.quiet
    assert not line.raw


def test_every_option_is_read() -> None:
    line = parse(
        "answer << --cache refresh -m gpt-5-mini,local -s 'You are {terse}; cost $9.' -o other -t 0.5 --max-tokens 10 --max-cost 0.01 "
        r"--seed 7 --stop '\n' --stop END --user ana --tag app=docs --tag k=a=b --timeout 20 --format json "
        "--quiet --no-stream --raw"
    )
    assert line.names == ("answer", "other")
    assert line.options == {
        "model": "gpt-5-mini,local",
        "system": "You are {terse}; cost $9.",
        "temperature": 0.5,
        "max_tokens": 10,
        "max_cost": "0.01",
        "seed": 7,
        "stop": ["\n", "END"],
        "user": "ana",
        "tags": {"app": "docs", "k": "a=b"},
        "timeout": 20.0,
        "cache": "refresh",
    }
    assert (line.format, line.quiet, line.stream, line.raw) == ("json", True, False, True)


@pytest.mark.parametrize(
    "line, names",
    [
        ("a << -t 0", ("a",)),
        ("a<<-t 0", ("a",)),
        ("  a <<", ("a",)),
        ("-o a", ("a",)),
        ("a << -o a", ("a",)),
        ("-s 'x << y'", ()),
        ('-s "x<<y"', ()),
    ],
)
def test_names_of_variables(line, names) -> None:
    assert parse(line).names == names


@pytest.mark.parametrize("mode", ["use", "refresh", "off", "only"])
def test_what_the_cache_is_for(mode) -> None:
    assert parse(f"--cache {mode}").options == {"cache": mode}


def test_another_use_of_the_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="--cache: invalid choice: 'none'"):
        parse("--cache none")


def test_a_preset_is_handed_on_as_it_is() -> None:
    assert parse("--timeout chat").options == {"timeout": "chat"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("--max-token 3", "no option --max-token; did you mean --max-tokens?"),
        ("--max-token=3", "did you mean --max-tokens?"),
        ("-model x", "no option -model; did you mean --model?"),
        ("--zzzzzzzz", "no option --zzzzzzzz$"),
        ("--max 3", "no option --max"),
        ("-t hot", "-t is a number, not 'hot'"),
        ("--max-tokens 3.5", "--max-tokens is a whole number, not '3.5'"),
        ("--seed x", "--seed is a whole number"),
        ("--tag app", "--tag is KEY=VALUE, not 'app'"),
        ("--format xml", "--format: invalid choice: 'xml'"),
        ("-m", "-m/--model: expected one argument"),
        ("-s 'x", "no closing quotation"),
        ("1a << -t 0", "'1a' cannot be the name of a variable"),
        ("class <<", "'class' cannot be the name"),
        ("-o a.b", "'a.b' cannot be the name"),
        ("<< -t 0", "<< needs the name of a variable"),
        ("models", "'models' is no option"),
    ],
)
def test_what_is_wrong_is_said_in_one_error(line, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(line)
    assert caught.value.next_step


# -- the line of a comparison ------------------------------------------------------------------------------------------


def test_a_comparison_has_sides() -> None:
    said = parse_grid("grid << -m a,b -t 0,.7 --with s@1,s@2 --with t --repeat 3")
    assert (said.models, said.temperatures, said.saved) == (("a", "b"), (0.0, 0.7), ("s@1", "s@2", "t"))
    assert (said.cell.names, said.cell.repeat) == (("grid",), 3)


def test_without_sides_they_are_none() -> None:
    said = parse_grid("--max-cost 0.1 --tag k=v")
    assert (said.models, said.temperatures, said.saved) == (None, None, ())
    assert said.cell.options == {"max_cost": "0.1", "tags": {"k": "v"}}


@pytest.mark.parametrize("option", ["--chat x", "--schema x", "--tier hard", "--save x", "--format json"])
def test_what_a_comparison_does_not_have_is_said_of_it(option) -> None:
    with pytest.raises(ConfigError, match=f"%%llm_compare: there is no option {option.split()[0]}") as caught:
        parse_grid(option)
    assert caught.value.next_step == "%%llm_compare? shows every option with an example"


@pytest.mark.parametrize("option", ["--schema", "--chat", "--save", "--with"])
@pytest.mark.parametrize("value", ["''", "' '"])
def test_an_empty_name_is_not_as_if_nothing_was_said(option, value) -> None:
    with pytest.raises(ConfigError, match=f"{option} is empty"):
        parse(f"{option} {value}")
