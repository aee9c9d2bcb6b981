"""llmkit.recording.asked and machine: the same question has one digest everywhere, and no two questions share one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llmkit.call import Message, Params
from llmkit.endpoint import Link
from llmkit.recording.asked import DEFAULT, Asked
from llmkit.schema import Schema
from llmkit.testing import FakeClock
from tests.layers.script import call_for, endpoint


def asked(prompt="hi", default=None, **changes):
    return Asked.of(call_for(FakeClock(), prompt=prompt, **changes), default)


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBO" * 1000}}


def with_picture(part):
    return (Message("user", [{"type": "text", "text": "look"}, part]),)


def test_the_digest_is_whole_and_stays_the_same_from_version_to_version() -> None:
    """Another one here makes every recording that people have useless."""
    assert asked("Explain SSE.").digest == "b6cfd1670b0435373ad35e375092045d16196768a8da7ada35f2ceeea49f92f3"


DIFFERENT = [
    {},
    {"prompt": "hi "},
    {"prompt": "Hi"},
    {"model": "n"},
    {"messages": (Message("system", "be brief"), Message("user", "hi"))},
    {"messages": (Message("user", "hi"), Message("assistant", "hello"))},
    {"messages": (Message("assistant", "hi"),)},
    {"messages": with_picture(PICTURE)},
    {"messages": with_picture({"type": "image_url", "image_url": {"url": PICTURE["image_url"]["url"] + "AAAA"}})},
    {"messages": with_picture({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})},
    {"params": Params(temperature=0)},
    {"params": Params(temperature=0.5)},
    {"params": Params(top_p=0.5)},
    {"params": Params(max_tokens=5)},
    {"params": Params(seed=5)},
    {"params": Params(stop=("x",))},
    {"params": Params(stop=("x", "y"))},
    {"params": Params(extra={"min_p": 0.1})},
    {"params": Params(extra={"min_p": 0.1, "a": None})},
    {"repeat": 1},
    {"schema": Schema.of("name, age int")},
    {"schema": Schema.of("age int, name")},
]


def test_what_is_asked_differently_has_another_digest() -> None:
    every = [asked(**each) for each in DIFFERENT]
    for one, other in itertools.combinations(every, 2):
        assert one.digest != other.digest
        assert not {one.digest, *one.also} & {other.digest, *other.also}


@pytest.mark.parametrize(
    "same",
    [
        {"user": "ana", "tags": {"a": "b"}},
        {"max_cost_usd": 1, "max_total_tokens": 5},
        {"stream": False},
        {"cache": "off", "namespace": "user:ana"},
        {"route": (Link(endpoint=endpoint("elsewhere")),)},
        {"degraded_text": "later"},
        {"request_id": "another"},
    ],
)
def test_for_whom_how_long_and_which_way_make_no_difference(same) -> None:
    assert asked(**same).digest == asked().digest


def test_numbers_are_numbers_and_the_order_of_fields_says_nothing() -> None:
    assert asked(params=Params(temperature=0)).digest == asked(params=Params(temperature=0.0)).digest
    one, other = Params(extra={"a": 1, "b": {"c": 2, "d": 3}}), Params(extra={"b": {"c": 2, "d": 3}, "a": 1})
    assert asked(params=one).digest == asked(params=other).digest
    inside = Params(extra={"a": 1, "b": {"d": 3, "c": 2}})  # a schema is answered in the order of its properties
    assert asked(params=one).digest != asked(params=inside).digest


def test_pictures_stand_in_it_by_their_digest() -> None:
    form = asked(messages=with_picture(PICTURE)).form
    url = form["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,sha256:")
    assert len(url) < 120


def test_the_default_model_is_known_by_its_name_as_well() -> None:
    default, named, other = asked(model="m", default="m"), asked(model="m"), asked(model="n", default="n")
    assert default.form["model"] == DEFAULT
    assert default.digest == other.digest  # what a machine has for its default does not matter
    assert named.digest in default.also
    assert named.digest not in (other.digest, *other.also)


# -- what differs from machine to machine ------------------------------------------------------------------------------


def at_home(monkeypatch, home, prompt):
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    return asked(prompt)


def test_the_home_folder_does_not_matter(monkeypatch) -> None:
    here = at_home(monkeypatch, "/home/ana", "read /home/ana/data.csv and '/home/ana'")
    there = at_home(monkeypatch, "/Users/bob", "read /Users/bob/data.csv and '/Users/bob'")
    assert here.digest == there.digest
    for text in ("/home/anatole/x", "/backup/home/ana/x", "/home/ana.old/x", "/home/ana-2/x"):
        assert at_home(monkeypatch, "/home/ana", text).also == ()  # somebody else's


def test_a_path_that_stands_in_the_notebook_is_known_as_it_stands_there(monkeypatch) -> None:
    """Typed out, it is the same text on a machine with another home."""
    here = at_home(monkeypatch, "/home/ana", "read /home/ana/data.csv")
    there = at_home(monkeypatch, "/home/bob", "read /home/ana/data.csv")
    assert here.digest != there.digest
    assert there.digest in here.also


ADDRESS = "<__main__.Thing object at 0x7f{}>"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ADDRESS.format("0011223344"), ADDRESS.format("0099887766")),
        ("<function <lambda> at 0x7f0011223344>", "<function <lambda> at 0x7f0099887766>"),
        ('<code object f at 0x7f0011223344, file "x.py">', '<code object f at 0x7f0099887766, file "x.py">'),
        ("/tmp/ipykernel_123/4567.py", "/tmp/ipykernel_99/4567.py"),
        ("/tmp/tmpabcd1234/x.csv", "/tmp/tmp98zy_xwv/x.csv"),
        ("kernel-01234567-89ab-cdef-0123-456789abcdef.json", "kernel-76543210-89ab-cdef-0123-456789abcdef.json"),
    ],
)
def test_addresses_and_made_up_names_do_not_matter(one, other) -> None:
    assert asked(f"What of {one}?").digest == asked(f"What of {other}?").digest
    assert asked(f"What of {one}?").also != asked(f"What of {other}?").also


THING = ADDRESS.format("0011223344")
OTHER = ADDRESS.format("0099887766")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{THING} and {OTHER}: the same?", f"{THING} and {THING}: the same?"),
        ("What is 0x7fffffff in decimal?", "What is 0x7ffffffe in decimal?"),
        ("It crashed at 0x7f0011223344, why?", "It crashed at 0x7f0099887766, why?"),
        ("x < 3 at 0x7f0011223344>", "x < 3 at 0x7f0099887766>"),
        ("/tmp/report_1/x", "/tmp/report_2/x"),
        ("/tmp/tmpabcd1234extra/x", "/tmp/tmpabcd5678extra/x"),
        ("process 123", "process 124"),
        ("\x1ahome\x1a/x", "\x1a\x1ahome\x1a\x1a/x"),
        (f"What of {THING}?", "What of <__main__.Thing object at \x1aaddress 1\x1a>?"),
        ("~/data.csv", str(Path.home() / "data.csv")),
        ("2026-11-20", "2026-11-21"),
        ("cell 1", "cell 2"),
    ],
)
def test_two_questions_never_become_one(one, other) -> None:
    a, b = asked(one), asked(other)
    assert a.digest != b.digest
    assert not {a.digest, *a.also} & {b.digest, *b.also}


def test_placeholders_are_numbered_over_all_messages() -> None:
    one = asked(messages=(Message("user", THING), Message("user", THING)))
    other = asked(messages=(Message("user", THING), Message("user", OTHER)))
    assert one.digest != other.digest


def test_what_json_cannot_say_has_a_digest_all_the_same() -> None:
    odd = Params(extra={"a": {1, 2}, "b": float("nan"), "c": object(), 3: (1, 2)})
    assert len(asked(params=odd).digest) == 64
    assert asked("half a pair \ud83d").digest != asked("half a pair \ude00").digest
