"""llmkit.options: bad input is one clear error before anything is sent."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmkit.call import Timeouts
from llmkit.errors import ConfigError
from llmkit.options import Options


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temprature": 1}, "did you mean temperature"),
        ({"zzz": 1}, "there are model"),
        ({"temperature": 3}, "from 0 to 2"),
        ({"temperature": "hot"}, "'hot'"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": True}, "True"),
        ({"top_p": 0}, "above 0 to 1"),
        ({"max_tokens": 0}, "from 1"),
        ({"max_tokens": 1.5}, "1.5"),
        ({"seed": "x"}, "whole number"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 3}, "stop is a text"),
        ({"max_cost": 0}, "above 0"),
        ({"max_cost": "a lot"}, "a lot"),
        ({"max_cost": float("inf")}, "inf"),
        ({"max_cost": True}, "True"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": "poetry"}, "chat, code"),
        ({"tags": ["a"]}, "dict"),
        ({"tags": {"a": 1}}, "text to text"),
        ({"extra": 3}, "dict"),
        ({"model": ""}, "model is text"),
        ({"user": 3}, "user is text"),
        ({"on_event": 3}, "called"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Options.of(given)


def test_what_is_right_arrives() -> None:
    options = Options.of(
        {
            "model": "a,b",
            "temperature": 0,
            "max_tokens": 5,
            "stop": "END",
            "max_cost": 0.1,
            "timeout": 7,
            "tags": {"a": "b"},
        }
    )
    params = options.params()
    assert (params.temperature, params.max_tokens, params.stop) == (0, 5, ("END",))
    assert options.max_cost_usd == Decimal("0.1")
    assert options.timeouts(Timeouts(idle=3)) == Timeouts(idle=3, total=7)


def test_presets_and_whole_timeouts() -> None:
    assert Options.of({"timeout": "chat"}).timeouts(Timeouts()).total == 30
    assert Options.of({"timeout": "code"}).timeouts(Timeouts()).total == 60
    mine = Timeouts(total=None)
    assert Options.of({"timeout": mine}).timeouts(Timeouts()) is mine


def test_nothing_given_is_nothing_set() -> None:
    options = Options.of({})
    assert options.max_cost_usd is None
    assert options.timeouts(Timeouts(total=9)).total == 9
    assert options.params().extra == {}


@pytest.mark.parametrize("tier", ["easy", "", 3, "auto"])
def test_a_tier_is_one_of_three(tier: object) -> None:
    with pytest.raises(ConfigError, match="tier is one of simple, medium, hard, not "):
        Options.of({"tier": tier})


def test_a_call_has_a_model_or_a_tier() -> None:
    with pytest.raises(ConfigError, match="a model or a tier, not both: 'gpt-5' and 'hard'"):
        Options.of({"tier": "hard", "model": "gpt-5"})
    assert Options.of({"tier": "hard"}).tier == "hard"
