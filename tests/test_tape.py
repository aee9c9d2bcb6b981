"""llmkit.tape, and a client that records and replays: what it needs then, and what the environment says."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import llmkit
from llmkit import tape
from llmkit.recording.file import read
from llmkit.testing import Fault, Simulator

ROOT = str(Path(llmkit.__file__).parent.parent)
MODELS = {"smart": {"model": "simulator"}, "both": {"chain": ["smart", "simulator"]}}


@pytest.fixture(autouse=True)
def anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tape.start_over()
    yield
    tape.start_over()


def client(answer="one two three", **settings):
    known = {
        "model": "simulator",
        "transport": Simulator(answer),
        "state": {"url": "memory"},
        "cache": {"enabled": False},
    }
    return llmkit.Client(**known | settings)


@pytest.fixture
def recorded():
    with client(model="smart", models=MODELS, tiers={"simple": "both"}) as made:
        made.record("calls.jsonl")
        made.complete("by default")
        made.complete("by name", model="smart")
        made.complete("by tier", tier="simple")
        with pytest.raises(llmkit.ConfigError):
            made.complete("misspelt", model="smrt")
    return Path("calls.jsonl")


@pytest.fixture
def bare(monkeypatch):
    """A machine that knows nothing, and on which nobody may look for anything."""

    def refuse(*_):
        raise AssertionError("somebody looks for a server")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    for name in [name for name in os.environ if name.startswith("LLMKIT_") and name != "LLMKIT_DATA_DIR"]:
        monkeypatch.delenv(name)
    with llmkit.Client(state={"url": "memory"}) as made:
        yield made


def test_a_replay_needs_no_key_no_model_and_looks_for_none(recorded, bare) -> None:
    bare.replay(recorded)
    assert bare.default_model() == "smart"
    assert bare.complete("by default").text == "one two three"
    assert bare.complete("by default", model="smart").text == "one two three"  # it is the default
    assert bare.complete("by name", model="smart").text == "one two three"
    assert bare.complete("by tier", tier="simple").text == "one two three"
    with pytest.raises(llmkit.ConfigError, match="did you mean smart"):
        bare.complete("misspelt", model="smrt")
    with pytest.raises(llmkit.ReplayMismatch):
        bare.complete("by default", model="other")
    with pytest.raises(llmkit.ConfigError, match="there is no option"):
        bare.complete("by default", modle="other")
    assert len(bare.calls()) == 0


def test_options_that_do_not_change_the_question_do_not_matter(recorded, bare) -> None:
    bare.replay(recorded)
    options = {"user": "ana", "tags": {"a": "b"}, "max_cost": 1, "timeout": 3, "cache": "only", "request_id": "mine"}
    assert bare.complete("by default", **options).text == "one two three"
    with bare.stream("by default") as reply:
        assert "".join(chunk.text for chunk in reply) == "one two three"


def test_a_replayed_call_meets_no_budget_and_costs_nothing_now(recorded, bare) -> None:
    bare.replay(recorded)
    bare.set_budgets(request={"usd": 0.000001, "tokens": 1}, session={"usd": 0.000001})
    assert bare.complete("by default").text == "one two three"
    assert bare.spend()["calls"].sum() == 0


def test_live_asks_the_default_of_this_machine_where_the_recorded_one_is_unknown(recorded) -> None:
    with client("for real") as made:
        made.replay(recorded, live=True)
        assert made.complete("by default").text == "one two three"
        assert made.complete("something new").text == "for real"
        with pytest.raises(llmkit.ConfigError):
            made.complete("something new", model="unknown")
        made.live()
        assert made.complete("by default").text == "for real"
    assert len(read(recorded).takes) == 4


def test_threads_record_all_and_are_replayed_right(recorded) -> None:
    simulator = Simulator(lambda body: body["messages"][-1]["content"].upper())
    with client(transport=simulator) as made:
        made.record("threads.jsonl")
        answers = {}

        def ask(number):
            answers[number] = made.complete(f"question {number % 10}").request_id

        each(ask, range(40))
    recording = read(Path("threads.jsonl"))
    assert sorted(take.told["run"]["request_id"] for take in recording.takes.values()) == sorted(answers.values())
    assert {take.number for take in recording.takes.values()} == {1, 2, 3, 4}
    with client("never") as made:
        made.replay("threads.jsonl")
        again = {}

        def ask_again(number):
            reply = made.complete(f"question {number % 10}")
            again[number] = (reply.request_id, reply.text == f"QUESTION {number % 10}")

        each(ask_again, range(40))
    assert sorted(ident for ident, _ in again.values()) == sorted(answers.values())
    assert all(right for _, right in again.values())


def each(ask, numbers):
    threads = [threading.Thread(target=ask, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_a_comparison_is_replayed_with_all_its_samples(recorded) -> None:
    def asked(made):
        frame = made.compare("compare", models=["smart", "both"], temperatures=[0, 1], repeat=2)
        return frame.drop(columns=["reply"]).to_dict("records")

    with client(model="smart", models=MODELS) as made:
        made.record("grid.jsonl")
        first = asked(made)
    with llmkit.Client(state={"url": "memory"}) as made:
        made.replay("grid.jsonl")
        assert asked(made) == first
    assert len(first) == 8


def test_what_was_retried_and_failed_is_told_again(recorded) -> None:
    simulator = Simulator("one two three")
    with client(transport=simulator, retry={"attempts": 2, "initial": 0.01}) as made:
        made.record("faults.jsonl")
        simulator.fail(Fault.status(503), times=1)
        first = made.complete("retried")
        simulator.fail(Fault.cut(after=2), times=1)
        with pytest.raises(llmkit.StreamBroken) as broken, made.stream("cut") as reply:
            list(reply)
    with client("never") as made:
        made.replay("faults.jsonl")
        again = made.complete("retried")
        assert (again.attempts, again.request_id) == (first.attempts, first.request_id)
        with pytest.raises(llmkit.StreamBroken) as raised, made.stream("cut") as reply:
            list(reply)
        assert raised.value.block() == broken.value.block()
        assert raised.value.latency_s == broken.value.latency_s


@pytest.mark.parametrize("key", ["plain-words-0123456789", "sk-proj-0123456789abcdefghij"])
def test_no_key_is_in_the_file_wherever_it_was(monkeypatch, key) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    simulator = Simulator(f"your key is {key}, is it not")
    with client(transport=simulator) as made:
        made.record("calls.jsonl")
        asked = {"system": f"the key {key}", "stop": f"{key}!", "extra": {"note": key, key: 1}}
        made.complete(f"my key is {key}", **asked)
        simulator.fail(Fault.status(400, message=f"what is {key}?"), times=1)
        with pytest.raises(llmkit.InvalidRequest) as raised:
            made.complete(f"again {key}", model="simulator")
    assert key not in Path("calls.jsonl").read_text("utf-8")
    monkeypatch.delenv("OPENAI_API_KEY")
    with llmkit.Client(state={"url": "memory"}) as made:
        made.replay("calls.jsonl")
        assert made.complete(f"my key is {key}", **asked).text == "your key is [redacted], is it not"
        with pytest.raises(llmkit.InvalidRequest):
            made.complete(f"again {key}", model="simulator")
        with pytest.raises(llmkit.ReplayMismatch) as mismatch:
            made.complete(f"my key is not {key}", **asked)
    assert raised.value.status == 400
    assert key not in mismatch.value.block() or not key.startswith("sk-")


def test_record_again_begins_the_count_again(recorded) -> None:
    with client("first") as made:
        made.record("calls.jsonl", overwrite=True)
        made.complete("hi")
        made.record("calls.jsonl")
        made.complete("hi")
    assert [take.key[1] for take in read(recorded).takes.values()] == [1]


def test_an_async_client_does_the_same(recorded) -> None:
    async def main() -> list[str]:
        async with llmkit.AsyncClient(state={"url": "memory"}, transport=Simulator("never")) as made:
            made.replay(recorded)
            reply = await made.complete("by default")
            async with made.stream("by name", model="smart") as other:
                return [reply.text, *[chunk.text async for chunk in other]]

    whole, *pieces = asyncio.run(main())
    assert (whole, "".join(pieces)) == ("one two three", "one two three")


# -- the environment ---------------------------------------------------------------------------------------------------


def test_the_environment_has_all_clients_go_on_in_one_recording(monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_RECORD", "all.jsonl")
    for answer in ("first", "second"):
        with client(answer) as made:
            made.complete("the same")
    monkeypatch.delenv("LLMKIT_RECORD")
    assert [take.told["answer"]["text"] for take in read(Path("all.jsonl")).takes.values()] == ["second"]
    one, other = client("first"), client("second")
    with one, other:
        for each_client in (one, other):
            each_client.record("both.jsonl")
            each_client.complete("the same")
    monkeypatch.setenv("LLMKIT_REPLAY", "both.jsonl")
    one, other = client("never"), client("never")
    with one, other:
        assert [one.complete("the same").text, other.complete("the same").text] == ["first", "second"]


def test_a_forced_replay_is_not_left_by_a_cell(recorded, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_REPLAY", "calls.jsonl")
    with client("for real") as made:
        made.record("other.jsonl")
        made.live()
        made.replay("calls.jsonl", live=True)
        with pytest.raises(llmkit.ReplayMismatch):
            made.complete("something else")
    assert not Path("other.jsonl").exists()


def test_both_variables_are_an_error(monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_REPLAY", "a.jsonl")
    monkeypatch.setenv("LLMKIT_RECORD", "b.jsonl")
    with pytest.raises(llmkit.ConfigError, match="both set"):
        client()


def test_a_relative_path_stays_where_it_was_first_asked_for(recorded, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LLMKIT_REPLAY", "calls.jsonl")
    client().close()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with client("never") as made:
        assert made.complete("by name", model="smart").text == "one two three"


def test_a_forked_child_adds_to_the_recording_of_its_parent() -> None:
    code = """
        import multiprocessing
        import llmkit
        from llmkit.recording.file import read
        from pathlib import Path
        from llmkit.testing import Simulator

        client = llmkit.Client(model="simulator", transport=Simulator("one"), state={"url": "memory"})
        client.record("fork.jsonl")
        client.complete("parent")

        def work():
            client.complete("child")

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(30)
        client.complete("parent again")
        client.close()
        print([take.asked["messages"][0]["content"] for take in read(Path("fork.jsonl")).takes.values()])
    """
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "['parent', 'parent again', 'child']\n", done.stderr


def test_a_client_that_neither_records_nor_replays_loads_nothing_of_it() -> None:
    code = "import llmkit.client, sys; print([m for m in sys.modules if m.startswith(('llmkit.recording', 'llmkit.layers.replay'))])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
