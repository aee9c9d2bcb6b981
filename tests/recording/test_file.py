"""llmkit.recording.file and recorder: what stands in a recording, whoever writes to it and however they end."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import llmkit
from llmkit.errors import ConfigError
from llmkit.recording.asked import Asked
from llmkit.recording.file import read
from llmkit.recording.recorder import leave, recorder_at
from llmkit.recording.scrubbing import Scrub
from llmkit.testing import FakeClock, Simulator
from tests.layers.script import call_for

ROOT = str(Path(llmkit.__file__).parent.parent)


def question(prompt):
    return Asked.of(call_for(FakeClock(), prompt=prompt), None)


def answer(text):
    return {
        "answer": {"text": text, "chunks": [len(text)], "model": "m", "provider": "p", "source": "provider"},
        "way": {},
        "run": {"request_id": "r", "latency_s": 0.1},
    }


def opened(path, **more):
    return recorder_at(path, Scrub(tuple), **more)


def put(recorder, prompt, text):
    asked = question(prompt)
    recorder.write(asked, recorder.begin(asked), answer(text))


def texts(path):
    return [take.told["answer"]["text"] for take in read(path).takes.values()]


def test_a_line_is_there_as_soon_as_its_call_has_ended(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    for number in range(3):
        put(recorder, f"question {number}", f"answer {number}")
        assert texts(path) == [f"answer {each}" for each in range(number + 1)]
    leave(recorder)
    assert texts(path) == ["answer 0", "answer 1", "answer 2"]
    assert [each.name for each in tmp_path.iterdir()] == ["calls.jsonl"]


def test_recording_again_replaces_answers_in_their_place_and_adds_what_is_new(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    for number in range(3):
        put(recorder, f"question {number}", "old")
    leave(recorder)
    before = path.read_text("utf-8").splitlines()
    recorder = opened(path)
    put(recorder, "question 3", "new")
    put(recorder, "question 1", "new")
    leave(recorder)
    after = path.read_text("utf-8").splitlines()
    assert texts(path) == ["old", "new", "old", "new"]
    assert [before[i] == after[i] for i in range(4)] == [True, True, False, True]


def test_recording_the_same_again_changes_nothing(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    for _ in range(2):
        recorder = opened(path)
        put(recorder, "b", "1")
        put(recorder, "a", "2")
        leave(recorder)
        lines, before = path.read_bytes(), path.stat().st_ino
    recorder = opened(path)
    leave(recorder)
    assert (path.read_bytes(), path.stat().st_ino) == (lines, before)


def test_overwrite_begins_anew_but_only_a_recording(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "old")
    leave(recorder)
    recorder = opened(path, overwrite=True)
    put(recorder, "b", "new")
    leave(recorder)
    assert texts(path) == ["new"]
    notebook = tmp_path / "work.ipynb"
    notebook.write_text('{\n "cells": []\n}\n', "utf-8")
    with pytest.raises(ConfigError, match="this is no recording of llmkit"):
        opened(notebook, overwrite=True)
    assert notebook.read_text("utf-8") == '{\n "cells": []\n}\n'


def test_it_is_as_readable_by_others_as_the_user_wants(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    before = os.umask(0o027)
    try:
        recorder = opened(path)
        put(recorder, "a", "1")
        put(recorder, "a", "2")
        leave(recorder)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        recorder = opened(path)
        put(recorder, "a", "3")
        leave(recorder)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_cell_that_is_run_again_has_one_answer(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    for cell, run, text in [
        ("one", "1", "a"),
        ("two", "2", "b"),
        ("one", "3", "c"),
        ("one", "4", "d"),
        (None, None, "e"),
    ]:
        recorder.within(cell, run)
        put(recorder, "the same", text)
    recorder.within("two", "5")
    put(recorder, "the same", "f")
    put(recorder, "the same", "g")  # it asks twice now
    leave(recorder)
    assert texts(path) == ["d", "f", "e", "g"]


# -- who may write -----------------------------------------------------------------------------------------------------

RECORD = """
    import sys, time
    import llmkit
    from llmkit.testing import Simulator

    client = llmkit.Client(model="simulator", transport=Simulator("one two"), state={"url": "memory"})
    client.record(sys.argv[1])
    for number in range(10**9):
        client.complete(f"question {number} of {sys.argv[2]}")
        print(number, flush=True)
        time.sleep(float(sys.argv[3]))
"""


def begun(path, name="a", pause=0.0):
    command = [sys.executable, "-c", textwrap.dedent(RECORD), str(path), name, str(pause)]
    env = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_do_not_record_to_one_file_and_a_dead_one_is_no_hindrance(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    first = begun(path, pause=0.01)
    try:
        assert first.stdout.readline() == "0\n"
        with pytest.raises(ConfigError, match="another kernel records to it"):
            opened(path)
        client = llmkit.Client(model="simulator", transport=Simulator(), state={"url": "memory"})
        with client, pytest.raises(ConfigError) as raised:
            client.record(path)
        assert "%llm live there" in raised.value.next_step
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    recorder = opened(path)
    put(recorder, "a", "mine")
    leave(recorder)
    assert texts(path)[-1] == "mine"


@pytest.mark.parametrize("after", [1, 7])
def test_a_process_that_is_killed_loses_the_call_in_flight_at_most(tmp_path, after) -> None:
    path = tmp_path / "calls.jsonl"
    process = begun(path)
    seen = -1
    while seen < after:
        seen = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    seen = max([seen, *map(int, rest.split())])
    recording = read(path)
    asked = [take.asked["messages"][0]["content"] for take in recording.takes.values()]
    assert asked[: seen + 1] == [f"question {number} of a" for number in range(seen + 1)]
    assert len(asked) <= seen + 2
    with llmkit.Client(transport=Simulator("never"), state={"url": "memory"}) as client:
        client.replay(path)
        assert client.complete("question 0 of a").text == "one two"


def test_a_last_line_that_was_cut_off_is_left_out_and_mended(tmp_path, caplog) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "1")
    put(recorder, "b", "2")
    leave(recorder)
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 2, len(whole)):
        path.write_bytes(whole[:cut])
        assert (read(path).torn, texts(path)) == (True, ["1"])
    recorder = opened(path)
    assert "its last line was cut off" in caplog.text
    put(recorder, "b", "3")
    leave(recorder)
    assert texts(path) == ["1", "3"]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "1")
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:20]) if len(data) > 20 else _full())
    with pytest.raises(OSError, match="No space"):
        put(recorder, "b", "x" * 7)
    monkeypatch.undo()
    put(recorder, "c", "3")
    assert texts(path) == ["1", "3"]
    leave(recorder)


def _full():
    raise OSError(28, "No space left on device")


def test_a_file_that_was_taken_away_is_made_again_with_all_that_was_in_it(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "1")
    path.unlink()
    put(recorder, "b", "2")
    leave(recorder)
    assert texts(path) == ["1", "2"]


def test_a_file_that_a_cell_looks_into_stays_locked(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "1")
    path.read_text("utf-8")
    code = "import sys; from pathlib import Path; from llmkit.recording.recorder import recorder_at; "
    code += "from llmkit.recording.scrubbing import Scrub; recorder_at(Path(sys.argv[1]), Scrub(tuple))"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=False)
    assert "another kernel records to it" in done.stderr
    leave(recorder)


def test_clients_of_one_process_record_to_one_file(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    clients = [llmkit.Client(model="simulator", transport=Simulator(name), state={"url": "memory"}) for name in "ab"]
    for client in clients:
        client.record(path)
    for client in clients:
        client.complete("the same")
    for client in clients:
        client.close()
    assert texts(path) == ["a", "b"]
    leave(opened(path))  # nobody holds it


# -- garbage -----------------------------------------------------------------------------------------------------------


def recorded(tmp_path):
    path = tmp_path / "calls.jsonl"
    recorder = opened(path)
    put(recorder, "a", "1")
    leave(recorder)
    return path


HEAD = '{"format": "llmkit-recording", "version": 1}\n'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "this is no recording"),
        (b"\x89PNG\r\n\x1a\n\x00", 1, "this is no recording"),
        (b"{}\n", 1, "this is no recording"),
        (b'{"cells": []}\n', 1, "this is no recording"),
        (b"[1]\n", 1, "this is no recording"),
        (
            b'{"format": "llmkit-recording", "version": 2}\n',
            1,
            "a recording of version 2, and this llmkit reads version 1",
        ),
        (b'{"format": "llmkit-recording", "version": 1, "default": 3}\n', 1, "its first line is of the wrong kind"),
        (f"{HEAD}\nnot JSON\n".encode(), 3, "not a line of JSON"),
        (f"{HEAD}[{'[' * 100_000}\n".encode(), 2, "not a line of JSON"),
        (f"{HEAD}\x80\n".encode("latin-1"), 2, "not a line of JSON"),
        (f'{HEAD}{{"digest": "abc"}}\n'.encode(), 2, "its digest is missing, or none"),
    ],
)
def test_what_is_no_recording_is_one_error_that_names_the_line(tmp_path, content, line, message) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert (raised.value.file, raised.value.line) == (path, line)
    assert message in raised.value.message
    if content:
        with pytest.raises(ConfigError):
            opened(path)
        assert path.read_bytes() == content


def spoilt():
    """Each field of a line, of each wrong kind."""
    good = {"digest": "a" * 64, "n": 1, "asked": {"model": "m", "messages": []}, **answer("text")}
    good["way"] = {
        "attempts": [{"number": 1, "provider": "p", "model": "m", "status": "complete", "cost_usd": "0.1"}],
        "skipped": [["p:m", "why"]],
        "warnings": ["w"],
        "notes": [{"scope": "day", "message": "m"}],
        "saved_usd": "1",
    }
    good["run"] |= {"attempts": [[1.0, 0.1, None, "x"]]}
    bad = [None, -1, 1.5, True, "x" * 3, [], [1], {}, {"a": 1}, "\ud800", "NaN", 10**400]
    places = [
        ("digest",),
        ("n",),
        ("also",),
        ("asked",),
        ("asked", "model"),
        ("asked", "messages"),
        ("answer",),
        ("run",),
    ]
    places += [
        ("answer", name) for name in ("text", "chunks", "model", "source", "usage", "tool_calls", "cut", "reasoning")
    ]
    places += [("way", name) for name in ("attempts", "skipped", "warnings", "notes", "saved_usd", "repairs")]
    places += [("run", name) for name in ("request_id", "latency_s", "attempts", "started", "waited_s")]
    places += [("way", "attempts", 0, name) for name in ("number", "provider", "cost_usd", "usage", "http_status")]
    for place in places:
        for value in bad:
            fields = json.loads(json.dumps(good))
            inner = fields
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = value
            yield fields


def test_a_spoilt_line_is_an_error_or_a_call_that_can_be_replayed(tmp_path) -> None:
    """Whatever stands there: no other exception, neither when it is read nor when it is told."""
    import asyncio

    path, refused = tmp_path / "calls.jsonl", 0

    async def replayed(take) -> None:
        from llmkit.layers.replay import replayed

        try:
            reply = await replayed(take.checked(), call_for(FakeClock()), FakeClock())
            await reply.read()
            _ = repr(reply), reply.cost_usd, reply.attempts
        except llmkit.LLMKitError as error:
            error.block().encode()

    for fields in spoilt():
        path.write_text(HEAD + json.dumps(fields) + "\n", "utf-8")
        try:
            recording = read(path)
        except ConfigError as error:
            assert error.line == 2
            refused += 1
            continue
        for take in recording.takes.values():
            asyncio.run(replayed(take))
    assert refused > 150


@pytest.mark.parametrize(
    "error",
    [
        {"type": "SystemExit", "message": "x"},
        {"type": "__builtins__", "message": "x"},
        {"type": "BudgetExceeded"},
        {"type": "BudgetExceeded", "message": 3},
        {"type": "BudgetExceeded", "message": "x", "spent": "much"},
        {"type": "BudgetExceeded", "message": "x", "spent": {"decimal": "NaN"}},
        {"type": "BudgetExceeded", "message": "x", "next_step": 5},
        {"type": "BudgetExceeded", "message": "x", "resets_at": {"time": "never"}},
        {"type": "BudgetExceeded", "message": "x", "scope": {"object": "x"}},
        {"type": "AllModelsFailed", "message": "x"},
        {"type": "AllModelsFailed", "message": "x", "errors": [{"type": "object", "message": "x"}]},
        {"type": "SchemaMismatch", "message": "x", "problems": [1]},
        "an error",
    ],
)
def test_an_error_of_no_known_kind_is_not_raised(tmp_path, error) -> None:
    path = tmp_path / "calls.jsonl"
    fields = {"digest": "a" * 64, "n": 1, "asked": {"model": "m", "messages": []}, "error": error}
    path.write_text(HEAD + json.dumps(fields | {"run": {"request_id": "r"}}) + "\n", "utf-8")
    with pytest.raises(ConfigError, match="line 2: not a recorded call"):
        read(path)


def test_what_an_error_says_cannot_drive_a_terminal(tmp_path) -> None:
    path = recorded(tmp_path)
    error = {"type": "StoreError", "message": "a\x1b[2Jb\x9b", "next_step": "c\x07\rd", "__class__": "x", "args": [1]}
    fields = {"digest": "a" * 64, "n": 1, "asked": {"model": "m", "messages": []}, "error": error}
    path.write_text(HEAD + json.dumps(fields | {"run": {"request_id": "r"}}) + "\n", "utf-8")
    (take,) = read(path).takes.values()
    assert take.checked().error().block() == "StoreError: a [2Jb \nnext: c  d"


@pytest.mark.parametrize(
    ("kind", "message"), [("missing", "No such file"), ("folder", "Is a directory"), ("pipe", "it is no file")]
)
def test_a_file_that_cannot_be_read(tmp_path, kind, message) -> None:
    path = tmp_path / "calls.jsonl"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":  # nobody writes to it: whoever opens it waits
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=message):
        read(path)
    if kind != "missing":
        with pytest.raises(ConfigError, match="cannot be recorded to"):
            opened(path)
    else:
        with pytest.raises(ConfigError, match="cannot be recorded to: No such file"):
            opened(tmp_path / "nowhere" / "calls.jsonl")
