"""A notebook that is recorded here is replayed there: another home, no key, no settings, no network, the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import llmkit
from llmkit.ledger import Ledger
from tests.notebook.server import CUT, Server, refused, said
from tests.notebook.strict import nbval

ROOT = str(Path(llmkit.__file__).parent.parent)
KEY = "plain-words-0123456789"  # like no key of anybody's, so that it is known by its variable alone
NO_NETWORK = """
import socket

def refuse(self, address):
    raise RuntimeError(f"somebody connects to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""
CELLS = [
    "words = ['one', 'two']",
    "%%llm a <<\nSay {{ words }}",
    "%%llm -t 0.3\nretry, please",
    "%%llm -m deaf,tiny\nfall back",
    "%%llm b << --no-stream\nSay {{ words }}",  # from the cache
    "%%llm\nbreak in the middle",
    "%%llm -m deaf\nnobody is there",
    "%%llm -m nope\nno such model",
    "%%llm --max-cost 0.0000001\ntoo dear",
    "%%llm person << --schema 'name, age int'\nWho?",
    "person.data",
    "%%llm_compare -m tiny,deaf -o frame\ncompare",
    "frame[['model', 'text', 'error', 'cost_usd', 'latency_s', 'request_id']]",
    "%%llm --repeat 2\nsamples",
    f"%%llm\nmy key is {KEY}, my address ana@example.com",
    "import threading\nthing = object()",
    "%%llm\nWhat is {{ thing }} in {{ home }}?",
    "print([a.request_id, a.latency_s, a.time_to_first_token_s, a.attempts, [c.text for c in a.chunks]])",
    "print([b.source, b.saved_usd, b.cost_usd, b.usage, b.finish_reason, b.call.trail.warnings])",
    "%llm use deaf,tiny",  # which need not exist where it is replayed
    "%llm budget session=2usd",
]
HOME = "from pathlib import Path; home = str(Path.home())"


def notebook(first):
    cells = [nbformat.v4.new_code_cell(each) for each in ["%load_ext llmkit", first, HOME, *CELLS]]
    for cell in cells:
        cell.metadata["tags"] = ["raises-exception"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def ran(book, folder, env):
    """``book`` with its outputs, run in ``folder``."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        NotebookClient(book, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return book


def machine(folder, mode, **more):
    """The environment of one that has its home in ``folder``."""
    (folder / "home").mkdir(parents=True)
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_") and name != "VLLM_API_KEY"
    }
    env |= {"HOME": str(folder / "home"), "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": ROOT}
    env |= {"LLMKIT_OFFLINE": "1", "LLMKIT_DATA_DIR": str(folder / "data"), "LLMKIT_DISPLAY": mode}
    return env | more


class Here:
    """The machine that records: a server, a key, settings."""

    def __init__(self, folder, mode, **more):
        self.folder = folder
        self.env = machine(folder, mode, VLLM_API_KEY=KEY, **more)
        self.server = Server()
        (folder / "llmkit.toml").write_text(self.server.settings(), "utf-8")
        self.server.next(
            said("Hello ", "*you* ", "there"),
            refused(503, "busy", retry_after="0.2"),
            said("at ", "last"),
            said("it fell"),
            said("the first half ", CUT),
            said('{"name": "Ana", "age": 3}'),
        )

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def there(folder, mode, **more):
    """The machine that replays: nothing but the recording, and no way to connect to anything."""
    env = machine(folder, mode, **more)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK, "utf-8")
    return env | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), ROOT])}


@pytest.fixture(scope="module", params=["live", "final"])
def pair(request, tmp_path_factory):
    """The same notebook, recorded and replayed; and where both are."""
    base, mode = tmp_path_factory.mktemp(request.param), request.param
    (base / "here").mkdir()
    here = Here(base / "here", mode)
    try:
        recorded = ran(notebook("%llm record calls.jsonl"), here.folder, here.env)
        sent = len(here.server.requests)
        far = base / "there"
        env = there(far, mode)
        shutil.copy(here.folder / "calls.jsonl", far)
        replayed = ran(notebook("%llm replay calls.jsonl"), far, env)
        assert len(here.server.requests) == sent
    finally:
        here.close()
    return recorded, replayed, here.folder, far, mode


def test_a_replayed_notebook_has_the_same_outputs_byte_for_byte(pair) -> None:
    recorded, replayed, *_ = pair
    for was, now in zip(recorded.cells[2:], replayed.cells[2:], strict=True):
        assert json.dumps(now.outputs) == json.dumps(was.outputs), was.source
    kinds = [output.output_type for cell in recorded.cells for output in cell.outputs]
    assert kinds.count("error") >= 4
    text = json.dumps([cell.outputs for cell in recorded.cells])
    for part in (
        "1 retry (503)",
        "fell back from vllm:deaf",
        "cache, saved",
        "broken off",
        "BudgetExceeded",
        "StreamBroken",
    ):
        assert part in text


def test_the_first_cells_say_what_goes_on(pair) -> None:
    recorded, replayed, *_ = pair
    assert recorded.cells[1].outputs[0].text == "llmkit: calls are recorded in calls.jsonl until %llm live\n"
    assert replayed.cells[1].outputs[0].text.startswith("llmkit: replaying calls.jsonl, 1")
    assert replayed.cells[1].outputs[0].text.endswith(" calls; nothing is sent\n")


def test_the_recording_holds_no_key_and_nothing_of_the_machine(pair) -> None:
    *_, folder, _, _ = pair
    text = (folder / "calls.jsonl").read_text("utf-8")
    assert KEY not in text
    assert "my key is [redacted], my address ana@example.com" in text
    assert os.uname().nodename not in text
    assert str(folder / "llmkit.toml") not in text
    digests = [json.loads(line)["digest"] for line in text.splitlines()[1:]]
    assert all(len(digest) == 64 for digest in digests)


def test_a_replay_leaves_no_trace_in_the_ledger(pair) -> None:
    *_, near, far, _ = pair
    assert calls_in(far) == 0
    assert calls_in(near) >= 12


def calls_in(folder):
    ledger = Ledger.open(f"sqlite:///{folder}/data/ledger.sqlite3")
    found = ledger.calls()
    ledger.close()
    return len(found)


def test_a_notebook_is_replayed_by_the_environment_as_it_is_and_nbval_is_green(pair, tmp_path) -> None:
    """Without a change to any cell: the very one that records is replayed, the first line and ``%llm record`` included."""
    book, _, near, _, mode = pair
    far = tmp_path / "there"
    env = there(far, mode, LLMKIT_REPLAY="calls.jsonl")
    shutil.copy(near / "calls.jsonl", far)
    again = ran(notebook("%llm record calls.jsonl"), far, env)
    assert json.dumps([cell.outputs for cell in again.cells]) == json.dumps([cell.outputs for cell in book.cells])
    nbformat.write(book, far / "book.ipynb")
    changed = (far / "book.ipynb").read_text("utf-8").replace("retry, please", "retry, would you")
    (far / "changed.ipynb").write_text(changed, "utf-8")
    done = nbval(far, env, "book.ipynb", "changed.ipynb")
    assert re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE) == ["changed.ipynb::Cell"], done.stdout[-3000:]
    assert "changed.ipynb::Cell 5" in done.stdout
    assert f"1 failed, {2 * len(book.cells) - 1} passed" in done.stdout


def test_a_replayed_notebook_passes_nbval_on_what_it_was_saved_with(pair) -> None:
    _, replayed, _, far, mode = pair
    nbformat.write(replayed, far / "book.ipynb")
    env = {**machine(far / mode, mode), "PYTHONPATH": os.pathsep.join([str(far / "site"), ROOT])}
    done = nbval(far, env, "book.ipynb")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(replayed.cells)} passed" in done.stdout


def test_personal_data_is_left_out_where_that_is_asked_for_and_the_questions_are_found(tmp_path) -> None:
    (tmp_path / "here").mkdir()
    here = Here(tmp_path / "here", "final")
    cells = ["%%llm a <<\nI am ana@example.com, call +49 170 1234567", "a"]
    book = notebook("%llm record calls.jsonl --scrub")
    book.cells[2:] = [nbformat.v4.new_code_cell(each) for each in cells]
    try:
        while not here.server.script.empty():
            here.server.script.get_nowait()
        here.server.next(said("Hello ana@", "example.com, card 4111 1111", " 1111 1111"))
        ran(book, here.folder, here.env)
    finally:
        here.close()
    text = (here.folder / "calls.jsonl").read_text("utf-8")
    assert "ana@" not in text
    assert "4111" not in text
    assert "1234567" not in text
    far = tmp_path / "there"
    env = there(far, "final")
    shutil.copy(here.folder / "calls.jsonl", far)
    book.cells[1].source = "%llm replay calls.jsonl"
    ran(book, far, env)
    assert book.cells[3].outputs[0].data["text/markdown"] == "Hello [e-mail], card [card]"


# -- the commands --------------------------------------------------------------------------------------------------------


def said_by(shell, capsys, line):
    capsys.readouterr()
    shell.run_line_magic("llm", line)
    return capsys.readouterr().out


def run(shell, cell, line=""):
    shell.run_cell_magic("llm", line, cell)
    return shell.user_ns["_"]


def test_record_replay_and_live_in_one_session(shell, folder, server, capsys) -> None:
    server.next(said("first"))
    assert said_by(shell, capsys, "record calls.jsonl") == "llmkit: calls are recorded in calls.jsonl until %llm live\n"
    assert run(shell, "hi").text == "first"
    status = said_by(shell, capsys, "")
    assert "\ncalls     recording to calls.jsonl, 1 call so far; keys are left out\n" in status
    assert said_by(shell, capsys, "live") == "llmkit: live from here on; calls.jsonl has 1 call\n"
    assert "calls     " not in said_by(shell, capsys, "")
    assert said_by(shell, capsys, "replay calls.jsonl") == "llmkit: replaying calls.jsonl, 1 call; nothing is sent\n"
    sent = len(server.requests)
    assert run(shell, "hi").text == "first"
    assert len(server.requests) == sent
    assert "\ncalls     replaying calls.jsonl, 1 call; nothing is sent\n" in said_by(shell, capsys, "")
    with pytest.raises(llmkit.ReplayMismatch):
        run(shell, "hi there")
    line = said_by(shell, capsys, "replay calls.jsonl --live")
    assert line == "llmkit: replaying calls.jsonl, 1 call; what is not there is asked for real\n"
    assert run(shell, "hi there").text == "Hello there."
    said_by(shell, capsys, "live")
    assert said_by(shell, capsys, "live").startswith("llmkit: live already")


def test_a_client_in_a_cell_of_python_is_recorded_and_replayed_with_the_notebook(shell, folder, server) -> None:
    before = llmkit.Client()
    shell.run_line_magic("llm", "record calls.jsonl")
    after = llmkit.Client()
    with before, after:
        texts = [before.complete("one").text, after.complete("two").text]
    shell.run_line_magic("llm", "replay calls.jsonl")
    sent = len(server.requests)
    with llmkit.Client() as again:
        assert [again.complete("one").text, again.complete("two").text] == texts
        with pytest.raises(llmkit.ReplayMismatch):
            again.complete("three")
        assert len(server.requests) == sent
        shell.run_line_magic("llm", "live")
        again.complete("three")
        assert len(server.requests) == sent + 1


def test_paths_begin_at_the_notebooks_folder(shell, folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shell.run_line_magic("llm", "record calls.jsonl")
    run(shell, "hi")
    shell.run_line_magic("llm", "live")
    assert (folder / "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("record", "which file"),
        ("record a b", "one file at a time"),
        ("record a --scrb", "there is no --scrb"),
        ("record a.jsonl --overwrite --new", "say one of them"),
        ("replay", "which file"),
        ("replay nowhere.jsonl", "No such file"),
        ("replay llmkit.toml", "this is no recording of llmkit"),
        ("record llmkit.toml", "this is no recording of llmkit"),
        ("live now", "has no place here"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(shell, folder, line, message) -> None:
    before = (folder / "llmkit.toml").read_text("utf-8")
    with pytest.raises(llmkit.ConfigError, match=message):
        shell.run_line_magic("llm", line)
    assert (folder / "llmkit.toml").read_text("utf-8") == before
    assert run(shell, "hi").text == "Hello there."


def test_a_failed_command_leaves_the_recording_as_it_was(shell, folder, server) -> None:
    shell.run_line_magic("llm", "record calls.jsonl")
    run(shell, "one")
    with pytest.raises(llmkit.ConfigError):
        shell.run_line_magic("llm", "replay nowhere.jsonl")
    run(shell, "two")
    shell.run_line_magic("llm", "live")
    assert len((folder / "calls.jsonl").read_text("utf-8").splitlines()) == 3


def test_other_settings_do_not_matter_and_nothing_is_looked_for(shell, folder, server) -> None:
    shell.run_line_magic("llm", "record calls.jsonl")
    run(shell, "by default")
    run(shell, "by name", "-m tiny")
    shell.run_line_magic("unload_ext", "llmkit")
    (folder / "llmkit.toml").unlink()
    shell.run_line_magic("load_ext", "llmkit")
    shell.run_line_magic("llm", "replay calls.jsonl")
    assert run(shell, "by default").model == "tiny-1"
    assert run(shell, "by name", "-m tiny").model == "tiny-1"
    shell.run_line_magic("llm", "use tiny")
    assert run(shell, "by name").model == "tiny-1"


def test_the_environment_says_so_at_load(bare, folder, server, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_RECORD", "calls.jsonl")
    bare.run_line_magic("load_ext", "llmkit")
    greeting = capsys.readouterr().out
    assert greeting.endswith(" · recording or replaying calls.jsonl\n")
    run(bare, "hi")
    bare.run_line_magic("unload_ext", "llmkit")
    monkeypatch.delenv("LLMKIT_RECORD")
    monkeypatch.setenv("LLMKIT_REPLAY", "calls.jsonl")
    capsys.readouterr()
    bare.run_line_magic("load_ext", "llmkit")
    assert capsys.readouterr().out == greeting
    sent = len(server.requests)
    assert run(bare, "hi").text == "Hello there."
    client = llmkit.Client()
    with client, pytest.raises(llmkit.ReplayMismatch):  # every client of the process
        client.complete("something else")
    for line in ("record other.jsonl", "live"):
        bare.run_line_magic("llm", line)
        with pytest.raises(llmkit.ReplayMismatch):
            run(bare, "something else")
    assert not (folder / "other.jsonl").exists()
    assert len(server.requests) == sent


def test_a_recording_of_python_calls_greets_with_what_it_does(bare, folder, capsys, monkeypatch) -> None:
    with llmkit.Client() as client:
        client.record("calls.jsonl")
        client.complete("hi")
    monkeypatch.setenv("LLMKIT_REPLAY", "calls.jsonl")
    bare.run_line_magic("load_ext", "llmkit")
    assert capsys.readouterr().out == "llmkit: replaying calls.jsonl, 1 call; nothing is sent\n"


def test_a_wrong_file_in_the_environment_is_said_at_load(bare, folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_REPLAY", "nowhere.jsonl")
    bare.run_line_magic("load_ext", "llmkit")
    assert "cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(llmkit.ConfigError):
        run(bare, "hi")
