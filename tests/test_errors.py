"""llmkit.errors: what errors must do wherever they come from."""

from __future__ import annotations

import copy
import pickle
from decimal import Decimal
from pathlib import Path

import pytest

from llmkit import errors
from llmkit.failure import read_back, written_out

OVERLOADED = errors.ProviderOverloaded("503", provider="p", model="m", status=503, retry_after=2.0)
EACH = [
    errors.AllModelsFailed("none", [OVERLOADED, errors.StoreError("s")]),
    errors.BudgetExceeded("no", scope="request", limit=Decimal(1), needed=Decimal(2)),
    errors.CircuitOpen("open", endpoint="p:m", state="open", retry_after=3.0),
    errors.ConfigError("wrong", file=Path("llmkit.toml"), line=3),
    errors.ContextTooLong("long", tokens=2, window=1),
    errors.EmptyReply("empty", reasoning_tokens=9),
    errors.FirstTokenTimeout("slow", limit=3.0, provider="p"),
    errors.GuardrailBlocked("no", stage="input", guard="g", reason="r"),
    errors.PriceUnknown("price", model="m"),
    errors.RateLimited("wait", retry_after=1.0),
    errors.Refused("no", reason="r"),
    errors.SchemaMismatch("no", problems=("age: Field required",), repaired=True, provider="p"),
    errors.StreamBroken("cut", text_so_far="abc"),
    errors.TemplateError("name", name="df"),
    OVERLOADED,
]


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_an_error_gets_out_of_a_worker_process_whole(error, way) -> None:
    error.spent = Decimal("0.01")
    twin = way(error)
    assert type(twin) is type(error)
    assert (str(twin), twin.block(), twin.spent) == (str(error), error.block(), error.spent)
    assert {name for name, value in vars(error).items() if repr(value) != repr(vars(twin)[name])} == set()


def test_nobody_is_told_that_nothing_was_spent_where_the_end_was_not_seen() -> None:
    error = errors.FirstTokenTimeout("slow", limit=3.0, provider="p")
    error.spent = Decimal(0)
    assert "spent: nothing\n" in error.block()
    error.unseen = 1
    assert "spent: nothing that was seen; the provider may bill more\n" in error.block()
    error.spent = Decimal("0.01")
    assert "spent: $0.0100 that was seen; the provider may bill more\n" in error.block()


def test_a_reply_stays_in_its_process() -> None:
    error = errors.StreamBroken("cut", text_so_far="abc")
    error.reply = object()
    assert pickle.loads(pickle.dumps(error)).reply is None


def test_an_amount_of_less_than_a_millionth_is_not_left_out() -> None:
    error = errors.StreamBroken("cut", text_so_far="abc")
    error.spent = Decimal("0.0000001")
    assert "spent: $0.0000001\n" in f"{error.block()}\n"


@pytest.mark.parametrize("error", [error for error in EACH if isinstance(error, errors.ProviderError)])
def test_one_that_another_process_told_of_can_be_shown(error) -> None:
    told = read_back(written_out(error))
    assert type(told) is type(error)
    assert told.block().startswith(f"{type(error).__name__}: ")


def test_no_message_is_a_command_to_a_terminal() -> None:
    error = errors.ConfigError("there is no \x1b]0;title\x07\x9b2J\u202e", next_step="write\rthis\x1b[2J\nor that")
    assert str(error) == "there is no \ufffd]0;title\ufffd\ufffd2J\ufffd"
    assert error.next_step == "write\ufffdthis\ufffd[2J\nor that"
    assert "\x1b" not in str(errors.AllModelsFailed("none of \x1b[2J", [error]))
