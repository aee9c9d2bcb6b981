"""llmkit.providers.canonical: everything that may change the answer changes the key, and the few other things do not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest

from llmkit.call import Call, Message, Params, Timeouts, Trail
from llmkit.endpoint import Endpoint, Link, Price
from llmkit.providers.canonical import SCHEMA, SILENT, RequestKeys
from llmkit.providers.http import WIRES
from llmkit.schema import Schema

IMAGE = "data:image/png;base64,"
MESSAGES = (
    Message("system", "be brief"),
    Message("user", "one"),
    Message("assistant", "two"),
    Message("user", [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": f"{IMAGE}AAAA"}}]),
)
PARAMS = Params(
    temperature=0.5, top_p=0.5, max_tokens=10, seed=1, stop=("END",), extra={"top_k": 3, "tools": [{"name": "a"}]}
)
ENDPOINT = Endpoint(provider="own", model="m", base_url="http://127.0.0.1:9/v1", headers=(("X-Mode", "fast"),))

keys = RequestKeys()  # one for all, so that what it remembers takes part


def endpoint_of(wire: str, **changes: Any) -> Endpoint:
    return replace(ENDPOINT, wire=wire, **changes)


def call_of(**changes: Any) -> Call:
    given = {"request_id": "r", "messages": MESSAGES, "model": "m", "route": (), "started": 0.0, "started_at": 0.0}
    return Call(**{**given, "params": PARAMS, **changes})


def key_of(call: Call, endpoint: Endpoint) -> str:
    key = keys(call, endpoint)
    assert key is not None
    assert len(key) == 64
    assert keys(call, endpoint) == key  # remembered or not
    assert RequestKeys()(call, endpoint) == key
    return key


wires = pytest.mark.parametrize("wire", sorted(WIRES))

OTHER_PARAMS: dict[str, list[Any]] = {
    "temperature": [None, 0.0, 0, 0.6, 1, 1.0],
    "top_p": [None, 0.4, 1],
    "max_tokens": [None, 11, 10**6],
    "seed": [None, 0, 2],
    "stop": [(), ("end",), ("END", "x"), ("x", "END")],
    "extra": [
        {},
        {"top_k": 3},
        {"top_k": 4, "tools": [{"name": "a"}]},
        {"top_k": 3, "tools": [{"name": "b"}]},
        {"top_k": 3, "tools": []},
        {"top_k": 3, "tools": [{"name": "a"}], "num_ctx": 4096},
        {"top_k": 3, "tools": [{"name": "a"}], "num_ctx": None},
        {"top_k": 3, "tools": [{"name": "a"}], "min_p": 0.1},
        {"top_k": 3, "tools": [{"name": "a"}], "response_format": {"type": "json_object"}},
        {"top_k": 3, "tools": [{"name": "a"}], "reasoning_effort": "low"},
    ],
}


def test_every_parameter_is_tried() -> None:
    assert {field.name for field in fields(Params)} == set(OTHER_PARAMS)


@wires
@pytest.mark.parametrize("name", sorted(OTHER_PARAMS))
def test_every_parameter_changes_the_key(wire: str, name: str) -> None:
    endpoint = endpoint_of(wire)
    made = [key_of(call_of(), endpoint)]
    made += [key_of(call_of(params=replace(PARAMS, **{name: value})), endpoint) for value in OTHER_PARAMS[name]]
    assert len(set(made)) == len(made)


@wires
def test_parameters_without_extra_change_the_key_as_well(wire: str) -> None:
    """These are the calls of which keys are remembered."""
    endpoint = endpoint_of(wire)
    plain = (Message("system", "be brief"), Message("user", "one"))
    made = []
    for changes in [{}, *({name: value} for name, values in OTHER_PARAMS.items() for value in values)]:
        if "extra" not in changes and (value := next(iter(changes.values()), True)) is not None and value != ():
            params = replace(Params(), **changes)
            made.append(key_of(call_of(messages=plain, params=params), endpoint))
    assert len(made) > 10
    # 1 and 1.0 are one question, asked in two ways: to be told apart is safe, to be mixed up at random is not.
    assert len(set(made)) == len(made)
    assert key_of(call_of(messages=plain, params=Params()), endpoint) == made[0]


OTHER_MESSAGES = [
    MESSAGES[:-1],
    MESSAGES[1:],
    (MESSAGES[0], MESSAGES[3], MESSAGES[2], MESSAGES[1]),
    (Message("system", "be long"), *MESSAGES[1:]),
    (*MESSAGES, Message("user", "")),
    (*MESSAGES[:1], Message("user", "One"), *MESSAGES[2:]),
    (*MESSAGES[:1], Message("user", "one "), *MESSAGES[2:]),
    (*MESSAGES[:1], Message("user", "onetwo"), Message("assistant", ""), *MESSAGES[3:]),
    (*MESSAGES[:1], Message("assistant", "one"), Message("user", "two"), *MESSAGES[3:]),
    (*MESSAGES[:1], Message("user", [{"type": "text", "text": "one"}]), *MESSAGES[2:]),
    (*MESSAGES[:3], Message("user", list(reversed(MESSAGES[3].content)))),
    (*MESSAGES[:3], Message("user", [{"type": "text", "text": "see"}])),
    (
        *MESSAGES[:3],
        Message("user", [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": f"{IMAGE}AAAB"}}]),
    ),
    (
        *MESSAGES[:3],
        Message("user", [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "https://x/y"}}]),
    ),
]


@wires
def test_every_message_its_role_its_place_and_its_parts_change_the_key(wire: str) -> None:
    endpoint = endpoint_of(wire)
    made = [key_of(call_of(messages=each), endpoint) for each in (MESSAGES, *OTHER_MESSAGES)]
    assert len(set(made)) == len(made)


OTHER_ENDPOINTS: dict[str, list[Any]] = {
    "model": ["m2", "M"],
    "base_url": ["http://127.0.0.1:10/v1", "http://127.0.0.1:9/v2", "https://127.0.0.1:9/v1"],
    "wire": ["other"],
    "simulated": [True],
    "headers": [(), (("X-Mode", "slow"),), (("X-Mode", "fast"), ("X-Beta", "1"))],
}
# What is known of an endpoint without being sent there. ``quirks`` and ``max_output`` count in what they make of a body.
UNSENT_ENDPOINTS: dict[str, list[Any]] = {
    "provider": ["another"],
    "api_key_env": ["SOME_KEY"],
    "key_required": [True],
    "local": [True],
    "price": [Price(input=Decimal(1), output=Decimal(1))],
    "window": [4096],
}


def test_every_field_of_an_endpoint_is_tried() -> None:
    assert {f.name for f in fields(Endpoint)} == {*OTHER_ENDPOINTS, *UNSENT_ENDPOINTS, "quirks", "max_output"}


@wires
def test_where_it_goes_changes_the_key(wire: str) -> None:
    made = [key_of(call_of(), endpoint_of(wire))]
    for name, values in OTHER_ENDPOINTS.items():
        if name != "wire":
            made += [key_of(call_of(), endpoint_of(wire, **{name: value})) for value in values]
    assert len(set(made)) == len(made)


def test_the_wire_format_changes_the_key() -> None:
    assert len({key_of(call_of(), endpoint_of(wire)) for wire in WIRES}) == len(WIRES)


@wires
def test_what_is_known_of_an_endpoint_and_not_sent_does_not(wire: str) -> None:
    made = [key_of(call_of(), endpoint_of(wire))]
    for name, values in UNSENT_ENDPOINTS.items():
        made += [key_of(call_of(), endpoint_of(wire, **{name: value})) for value in values]
    assert len(set(made)) == 1


def test_quirks_count_as_they_change_what_is_sent() -> None:
    def made(quirk: str, **params: Any) -> str:
        return key_of(call_of(params=Params(**params)), endpoint_of("openai", quirks=frozenset({quirk} - {""})))

    assert made("", seed=1) != made("random_seed", seed=1)
    assert made("") == made("random_seed")
    assert made("", max_tokens=5) != made("max_completion_tokens", max_tokens=5)
    assert made("") == made("no_stream_options")


def test_the_limit_that_anthropic_is_sent_is_in_the_key_although_nobody_said_it() -> None:
    call = call_of(params=Params())
    assert key_of(call, endpoint_of("anthropic", max_output=100)) != key_of(
        call, endpoint_of("anthropic", max_output=200)
    )


OTHER_CALLS: dict[str, list[Any]] = {
    "repeat": [1, 2],
    "namespace": ["user:ana", "1", "0 None "],
    "schema": [
        Schema.of(said) for said in ("a", "b", "a, b", "b, a", "a int", "[] a", {"type": "object", "minProperties": 1})
    ],
}
UNSENT_CALLS: dict[str, list[Any]] = {
    "request_id": ["another"],
    "model": ["alias"],
    "route": [(Link(endpoint=ENDPOINT),)],
    "started": [5.0],
    "started_at": [5.0],
    "stream": [True],
    "user": ["ana"],
    "tags": [{"app": "docs"}],
    "timeouts": [Timeouts(total=1)],
    "deadline": [9.0],
    "max_cost_usd": [Decimal(1)],
    "max_cost_is_default": [True],
    "max_total_tokens": [5],
    "degraded_text": ["busy"],
    "cache": ["refresh"],
    "request_key": ["k"],
    "link": [Link(endpoint=ENDPOINT)],
    "hold": [object()],
    "on_send": [print],
    "template": ["digest"],
    "trail": [Trail()],
}


def test_every_field_of_a_call_is_tried() -> None:
    assert {f.name for f in fields(Call)} == {*OTHER_CALLS, *UNSENT_CALLS, "messages", "params"}


@wires
@pytest.mark.parametrize("simple", [True, False])
def test_the_repeat_and_the_namespace_change_the_key_and_nothing_else_of_a_call(wire: str, simple: bool) -> None:
    endpoint = endpoint_of(wire)
    call = call_of(messages=(Message("user", "x"),), params=Params()) if simple else call_of()
    made = [key_of(call, endpoint)]
    for name, values in UNSENT_CALLS.items():
        assert {key_of(call.to(**{name: value}), endpoint) for value in values} == set(made), name
    for name, values in OTHER_CALLS.items():
        made += [key_of(call.to(**{name: value}), endpoint) for value in values]
    assert len(set(made)) == len(made)


SENT_BUT_SILENT = [(wire, name) for wire, names in SILENT.items() for name in sorted(names)]


@pytest.mark.parametrize("wire, name", SENT_BUT_SILENT)
@pytest.mark.parametrize("rest", [{}, {"top_k": 3}])
def test_the_listed_fields_do_not_change_the_key(wire: str, name: str, rest: dict) -> None:
    endpoint = endpoint_of(wire)
    if name == "stream":  # llmkit's own: extra must not name it
        assert key_of(call_of(stream=True), endpoint) == key_of(call_of(), endpoint)
        return
    plain = key_of(call_of(params=Params(extra=rest)), endpoint)
    for value in ("a", "b", {"user_id": "x"}, True, None):
        assert key_of(call_of(params=Params(extra={name: value, **rest})), endpoint) == plain
        assert key_of(call_of(params=Params(extra={**rest, name: value})), endpoint) == plain


def test_the_list_is_short_and_says_nothing_of_what_is_asked() -> None:
    everything = set().union(*SILENT.values())
    assert len(everything) <= 10
    assert set(SILENT) == set(WIRES)
    assert not everything & {"messages", "model", "system", "tools", "temperature", "seed", "n", "response_format"}


@wires
def test_a_listed_field_counts_where_it_is_inside_another(wire: str) -> None:
    endpoint = endpoint_of(wire)
    made = {
        key_of(call_of(params=Params(extra={"x": inner})), endpoint) for inner in ({}, {"user": "a"}, {"stream": True})
    }
    assert len(made) == 3


@wires
def test_the_order_of_fields_is_nothing_and_the_order_inside_them_is_something(wire: str) -> None:
    endpoint = endpoint_of(wire)

    def made(extra: dict) -> str:
        return key_of(call_of(params=Params(extra=extra)), endpoint)

    assert made({"a": 1, "b": 2}) == made({"b": 2, "a": 1})
    # A model answers the properties of a schema in the order in which they stand.
    first = {"schema": {"reason": "string", "answer": "string"}}
    second = {"schema": {"answer": "string", "reason": "string"}}
    assert made(first) != made(second)


@wires
def test_what_json_or_the_format_cannot_say_has_no_key(wire: str) -> None:
    endpoint = endpoint_of(wire)
    ring: list[Any] = []
    ring.append(ring)
    for extra in ({"x": float("nan")}, {"x": {1, 2}}, {"x": ring}, {"messages": []}, {"n": 2}):
        assert keys(call_of(params=Params(extra=extra)), endpoint) is None
    assert keys(call_of(), endpoint_of("telepathy")) is None
    if wire == "anthropic":
        assert keys(call_of(messages=(Message("tool", "x"),)), endpoint) is None


@wires
def test_text_that_is_no_text_has_the_key_of_what_is_sent_for_it(wire: str) -> None:
    endpoint = endpoint_of(wire)
    sent = WIRES[wire]
    odd, plain = (call_of(messages=(Message("user", text),), params=Params()) for text in ("\ud800", "?"))
    assert sent.body(odd, endpoint) != sent.body(plain, endpoint)
    assert key_of(odd, endpoint) == key_of(plain, endpoint)


def test_no_key_of_the_user_is_in_it() -> None:
    who = [("Authorization", "Bearer k"), ("x-api-key", "k"), ("API-KEY", "k"), ("Cookie", "k")]
    made = {
        key_of(call_of(), endpoint_of("openai", headers=(("X-Mode", "fast"), *more))) for more in ((), who[:1], who)
    }
    assert len(made) == 1


def test_long_prompts_and_many_of_them() -> None:
    endpoint = endpoint_of("openai")
    long = "x" * 100_000
    texts = [long, long + "x", *map(str, range(2000))]
    made = [keys(call_of(messages=(Message("user", text),), params=Params()), endpoint) for text in texts]
    again = [keys(call_of(messages=(Message("user", text),), params=Params()), endpoint) for text in texts]
    assert made == again
    assert len(set(made)) == len(texts)


def test_many_endpoints() -> None:
    made = [key_of(call_of(), endpoint_of("openai", model=f"m{n}")) for n in range(600)]
    assert len(set(made)) == 600


def test_the_key_is_what_the_page_says_it_is() -> None:
    """Written down once more, by hand: a change of the key must be meant, and raise SCHEMA."""
    call = call_of(messages=(Message("user", "hé"),), params=Params(max_tokens=5, extra={"b": 1, "a": 2}))
    where = json.dumps([1, "openai", "http://127.0.0.1:9/v1", False, [["x-mode", "fast"]]], separators=(",", ":"))
    which = "0 None \n"
    body = [["a", 2], ["b", 1], ["max_tokens", 5], ["messages", [{"role": "user", "content": "hé"}]], ["model", "m"]]
    said = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    assert SCHEMA == 1
    assert (
        key_of(call, endpoint_of("openai"))
        == hashlib.sha256(f"{where}\n{len(which)} {which}{said}".encode()).hexdigest()
    )


def test_another_process_makes_the_same_key() -> None:
    program = """
from llmkit.call import Call, Message, Params
from llmkit.endpoint import Endpoint
from llmkit.providers.canonical import RequestKeys
endpoint = Endpoint(provider="own", model="m", base_url="http://127.0.0.1:9/v1")
params = Params(stop=("a", "b"), extra={"z": {"y": 1, "x": 2}, "a": [1.5, None, True]})
call = Call(request_id="r", messages=(Message("user", "x"),), model="m", route=(), started=0.0, started_at=0.0, params=params)
print(RequestKeys()(call, endpoint))
"""
    made = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1
    assert len(made.pop().strip()) == 64
