"""The contract that every store keeps."""

from __future__ import annotations

import threading

import pytest

from llmkit.errors import ConfigError
from llmkit.state import open_store, sqlite
from llmkit.state.memory import MemoryStore
from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    CallEnded,
    CallServed,
    DuplicateCall,
)

OWNER = "host:1:a"


@pytest.fixture(params=["memory", "sqlite"])
def store(request):
    opened = open_store(request.param)
    yield opened
    opened.close()


def call_begun(request_id, started=1000.0, owner=OWNER):
    return CallBegun(request_id, started, "ana", '{"app": "docs"}', "smart", owner)


def attempt_begun(request_id, number=1, started=1000.5):
    return AttemptBegun(request_id, number, started, "openai", "gpt-5-mini", "https://api.openai.com/v1")


def attempt_ended(request_id, number=1, status="complete", nanos=1_000, tokens=12):
    return AttemptEnded(
        status,
        tokens,
        2,
        0,
        30,
        5,
        False,
        nanos,
        "table",
        '{"input": "0.25"}',
        "2026-11-01",
        0.5,
        0.1,
        200,
        "req_1",
        "stop",
        False,
        None,
        None,
        request_id,
        number,
    )


def call_ended(request_id, status="complete", nanos=1_000, tokens=12):
    return CallEnded(
        status,
        "gpt-5-mini-1",
        "openai",
        "provider",
        tokens,
        2,
        0,
        30,
        5,
        False,
        nanos,
        None,
        0.5,
        0.1,
        1,
        0,
        "stop",
        None,
        None,
        request_id,
    )


def commit(store, *changes):
    waiting = store.commit(changes)
    if waiting is not None:
        waiting.result(10)


def test_a_call_in_flight_is_there_with_nothing_known_of_its_end(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    (call,) = store.calls()
    (attempt,) = store.attempts("a")
    assert tuple(call) == CALL_COLUMNS
    assert tuple(attempt) == ATTEMPT_COLUMNS
    assert (call["status"], call["owner"], call["user"], call["tags"]) == ("in_flight", OWNER, "ana", '{"app": "docs"}')
    assert (call["cost_nanos"], call["input_tokens"], call["error"], call["estimated"]) == (None, None, None, None)
    assert (attempt["status"], attempt["provider"], attempt["started"]) == ("in_flight", "openai", 1000.5)
    assert attempt["maybe_billed"] is None


def test_what_ended_is_complete(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    commit(store, attempt_ended("a"), call_ended("a"))
    (call,) = store.calls()
    (attempt,) = store.attempts("a")
    assert {**call_begun("a")._asdict(), **call_ended("a")._asdict()} == call
    assert {**attempt_begun("a")._asdict(), **attempt_ended("a")._asdict()} == attempt


def test_an_end_changes_nothing_but_its_own_row(store):
    commit(store, call_begun("a"), attempt_begun("a"), attempt_begun("a", 2), call_begun("b"), attempt_begun("b"))
    commit(store, attempt_ended("a", 2), call_ended("b"))
    assert [row["status"] for row in store.attempts("a")] == ["in_flight", "complete"]
    assert [row["status"] for row in store.attempts("b")] == ["in_flight"]
    assert {row["request_id"]: row["status"] for row in store.calls()} == {"a": "in_flight", "b": "complete"}


def test_an_end_without_a_beginning_is_nothing(store):
    commit(store, attempt_ended("a"), call_ended("a"))
    assert store.calls() == []
    assert store.attempts("a") == []


def test_calls_come_newest_last_whatever_order_they_were_written_in(store):
    commit(store, call_begun("c", 3.0), call_begun("a", 1.0), call_begun("b2", 2.0), call_begun("b1", 2.0))
    assert [row["request_id"] for row in store.calls()] == ["a", "b1", "b2", "c"]
    assert [row["request_id"] for row in store.calls(limit=2)] == ["b2", "c"]
    assert [row["request_id"] for row in store.calls(since=2.0)] == ["b1", "b2", "c"]
    assert [row["request_id"] for row in store.calls(since=2.0, limit=1)] == ["c"]
    assert [row["request_id"] for row in store.calls(beginning="b")] == ["b1", "b2"]
    assert [row["request_id"] for row in store.calls(beginning="b", since=2.0, limit=1)] == ["b2"]
    assert store.calls(beginning="%") == store.calls(beginning="_") == []
    assert [row["request_id"] for row in store.calls(limit=99)] == ["a", "b1", "b2", "c"]


def test_a_row_that_was_read_is_the_readers_own(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    store.calls()[0]["status"] = store.attempts("a")[0]["status"] = "changed"
    assert store.calls()[0]["status"] == store.attempts("a")[0]["status"] == "in_flight"


def test_a_commit_is_all_or_nothing(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    with pytest.raises(DuplicateCall):
        commit(store, call_begun("b"), call_ended("a"), call_begun("a"))
    with pytest.raises(DuplicateCall):
        commit(store, call_ended("a"), attempt_begun("a"))
    (call,) = store.calls()
    assert (call["request_id"], call["status"]) == ("a", "in_flight")
    commit(store, call_ended("a"))
    assert store.calls()[0]["status"] == "complete"


def test_values_that_no_column_holds_are_brought_into_its_range(store):
    commit(store, call_begun("id \ud800"), attempt_begun("id \ud800"))
    commit(store, attempt_ended("id \ud800", tokens=10**30, nanos=-(10**30)), call_ended("id \ud800", tokens=10**30))
    assert store.calls()[0]["input_tokens"] == 2**63 - 1
    assert store.calls()[0]["status"] == "complete"
    (attempt,) = store.attempts("id \ud800")
    assert (attempt["input_tokens"], attempt["cost_nanos"]) == (2**63 - 1, -(2**63 - 1))


def test_text_is_data(store):
    nasty = "'; DROP TABLE calls; --\0\n€"
    commit(store, call_begun(nasty), attempt_begun(nasty))
    assert store.calls()[0]["request_id"] == nasty
    assert len(store.attempts(nasty)) == 1


def test_owners_are_those_with_calls_in_flight(store):
    commit(
        store,
        call_begun("a", 1.0, "x"),
        call_begun("b", 5.0, "x"),
        call_begun("c", 3.0, "y"),
        call_begun("d", 9.0, "z"),
    )
    commit(store, call_ended("d"))
    assert store.owners() == {"x": 5.0, "y": 3.0}


def test_calls_of_a_dead_owner_are_lost_and_maybe_billed(store):
    commit(store, call_begun("open", owner="dead"), attempt_begun("open"), attempt_begun("open", 2))
    commit(store, attempt_ended("open", 1, "failed"))
    commit(store, call_begun("between", owner="dead"), attempt_begun("between"), attempt_ended("between", nanos=7))
    commit(store, call_begun("waiting", owner="dead"))
    commit(store, call_begun("done", owner="dead"), attempt_begun("done"), attempt_ended("done"), call_ended("done"))
    commit(store, call_begun("other"), attempt_begun("other"))
    assert store.mark_lost("dead") == 3
    calls = {row["request_id"]: row for row in store.calls()}
    assert {key: row["status"] for key, row in calls.items()} == {
        "open": "lost",
        "between": "lost",
        "waiting": "lost",
        "done": "complete",
        "other": "in_flight",
    }
    assert [(row["status"], row["maybe_billed"]) for row in store.attempts("open")] == [
        ("failed", False),
        ("lost", True),
    ]
    assert [row["status"] for row in store.attempts("other")] == ["in_flight"]
    # The cost of an attempt whose end nobody saw is unknown, and so is that of its call.
    assert (calls["open"]["cost_nanos"], calls["between"]["cost_nanos"], calls["waiting"]["cost_nanos"]) == (None, 7, 0)
    assert (calls["open"]["attempts"], calls["waiting"]["attempts"]) == (2, 0)
    assert "billed" in calls["open"]["message"]
    assert store.owners() == {OWNER: 1000.0}
    assert store.mark_lost("dead") == 0


def test_a_call_that_was_thought_lost_and_ends_has_ended(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    store.mark_lost(OWNER)
    commit(store, attempt_ended("a"), call_ended("a"))
    assert (store.calls()[0]["status"], store.attempts("a")[0]["status"]) == ("complete", "complete")
    assert store.calls()[0]["message"] is None


def test_threads_share_it(store):
    def write(thread):
        for number in range(50):
            key = f"{thread}-{number}"
            commit(store, call_begun(key), attempt_begun(key))
            commit(store, attempt_ended(key), call_ended(key))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    rows = store.calls()
    assert len(rows) == 200
    assert {row["status"] for row in rows} == {"complete"}


def test_closing_twice_is_harmless_and_a_later_use_opens_it_again(store):
    commit(store, call_begun("a"), attempt_begun("a"))
    store.close()
    store.close()
    assert [row["request_id"] for row in store.calls()] == ["a"]
    commit(store, call_ended("a"))
    assert store.calls()[0]["status"] == "complete"


def test_pages_are_in_the_order_of_the_starts_and_hold_every_call_once(store):
    for number in (3, 1, 2, 5, 4):
        commit(store, call_begun(f"b{number}", started=1000.0 + number // 2), attempt_begun(f"b{number}"))
    commit(
        store, attempt_ended("b3", status="failed"), attempt_begun("b3", 2), attempt_ended("b3", 2), call_ended("b3")
    )
    commit(store, call_begun("a", started=1002.0))
    found, after = [], None
    while page := store.page(after, 2):
        assert len(page) <= 2
        found += page
        after = (page[-1][0]["started"], page[-1][0]["request_id"])
    assert [call["request_id"] for call, _ in found] == ["b1", "b2", "b3", "a", "b4", "b5"]
    attempts = {call["request_id"]: [row["number"] for row in made] for call, made in found}
    assert attempts == {"b1": [1], "b2": [1], "b3": [1, 2], "a": [], "b4": [1], "b5": [1]}
    assert found[2] == (store.calls()[2], store.attempts("b3"))


def test_memory_is_bounded():
    store = MemoryStore(max_calls=3)
    for number in range(10):
        commit(store, call_begun(str(number)), attempt_begun(str(number)))
    assert [row["request_id"] for row in store.calls()] == ["7", "8", "9"]
    assert store.attempts("1") == []
    assert len(store.attempts("9")) == 1


def test_urls(tmp_path, monkeypatch):
    assert open_store("memory").location == "memory"
    inside = open_store("sqlite")
    assert inside.location == str(tmp_path / "llmkit-data" / "ledger.sqlite3")
    inside.close()
    there = open_store(f"sqlite://{tmp_path}/elsewhere/my.db")
    assert there.location == str(tmp_path / "elsewhere" / "my.db")
    there.close()
    monkeypatch.setenv("HOME", str(tmp_path))
    home = open_store("sqlite:///~/home.db")
    assert home.location == str(tmp_path / "home.db")
    home.close()


@pytest.mark.parametrize(
    "url", ["", "sqlit", "sqlite://", "sqlite:///", "sqlite:///a\0b", "postgres://u:secret@h/x", "file.db"]
)
def test_a_url_that_names_no_store_is_one_clear_error(url):
    with pytest.raises(ConfigError, match=r"\[state\] url") as caught:
        open_store(url)
    assert "secret" not in caught.value.block()


def test_with_redis_the_rows_stay_on_this_machine():
    opened = open_store("redis://user:secret@host")
    assert opened.location == open_store("sqlite").location
    opened.close()


# -- what answers came to before -----------------------------------------------------------------------------------------


def answered(
    store, request_id, started, output, *, template=None, status="complete", model="gpt-5-mini", source="provider"
):
    begun = call_begun(request_id, started)._replace(template=template)
    attempt = attempt_begun(request_id, started=started)._replace(model=model)
    ended = call_ended(request_id, status)._replace(output_tokens=output, source=source)
    commit(store, begun, attempt)
    commit(store, attempt_ended(request_id, status=status), ended)


def test_the_newest_answers_tell_what_to_expect(store):
    for number in range(5):
        answered(store, f"a{number}", 1000.0 + number, 10 + number, template="t")
    answered(store, "b", 1100.0, 99)
    answered(store, "c", 1200.0, 500, template="t", model="gpt-5")
    assert store.outputs("openai:gpt-5-mini", "t", 3) == [(1004.0, 14), (1003.0, 13), (1002.0, 12)]
    assert store.outputs("openai:gpt-5-mini", None, 2) == [(1100.0, 99), (1004.0, 14)]
    assert store.outputs("openai:gpt-5", "t", 9) == [(1200.0, 500)]
    assert store.outputs("openai:gpt-5", "another", 9) == store.outputs("openai:no", None, 9) == []


def test_only_whole_answers_that_were_asked_for_are_expected_again(store):
    answered(store, "failed", 1000.0, 7, template="t", status="failed")
    answered(store, "degraded", 1001.0, 7, template="t", source="degraded")
    answered(store, "uncounted", 1002.0, None, template="t")
    served = CallServed(
        "hit", 1003.0, None, "{}", "m", OWNER, "gpt-5-mini", "openai", "cache", 5, 0.1, 0.1, "stop", "t"
    )
    commit(store, served, call_begun("flying")._replace(template="t"), attempt_begun("flying"))
    assert store.outputs("openai:gpt-5-mini", "t", 9) == store.outputs("openai:gpt-5-mini", None, 9) == []
    assert {call["template"] for call in store.calls()} == {"t"}


def test_a_name_no_store_could_hold_finds_what_was_stored_under_it(store):
    answered(store, "a", 1000.0, 3, template="t\udc80", model="m\udc80")
    assert store.outputs("openai:m\udc80", "t\udc80", 9) == [(1000.0, 3)]


def test_a_model_is_looked_for_among_the_newest_calls_and_a_template_among_all(store, monkeypatch):
    monkeypatch.setattr("llmkit.state.memory.NEWEST_CALLS", 3)
    monkeypatch.setattr("llmkit.state.sqlite._OF_ENDPOINT", sqlite._OF_ENDPOINT.replace("LIMIT 5000", "LIMIT 3"))
    for number in range(6):
        answered(store, f"a{number}", 1000.0 + number, number, template="t", model="m" if number < 4 else "n")
    assert store.outputs("openai:m", None, 9) == [(1003.0, 3)]
    assert store.outputs("openai:m", "t", 9) == [(1003.0, 3), (1002.0, 2), (1001.0, 1), (1000.0, 0)]
