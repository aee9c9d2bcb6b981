"""Errors in a real kernel and in a terminal: one block each, nothing twice, the run stops, and nothing stays open."""

from __future__ import annotations

import asyncio
import os
import sys

import nbformat
import pexpect
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import llmkit
from llmkit import errors, portal
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import CUT, Gone, refused, said, silent
from tests.notebook.strict import nbval
from tests.notebook.test_kernel import ROOT, WAIT_S, kernel, running, with_text  # noqa: F401 - fixtures

KEY = "sk-test-key-of-nobody-0123456789"

MADE = """
import inspect, llmkit
from llmkit import errors
VALUES = dict(scope="day", limit=1, needed=2, endpoint="a:b", state="open", retry_after=3.0, tokens=9, window=8,
              stage="input", guard="pii", reason="no", model="m")
def made(name):
    kind = getattr(errors, name)
    if name == "AllModelsFailed":
        return kind("none of 2 answered", [errors.BadResponse("one"), errors.EmptyReply("two")])
    wanted = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return kind("what happened", **{p.name: VALUES[p.name] for p in wanted if p.default is p.empty})
"""


@pytest.mark.parametrize("name", errors.__all__)
def test_each_error_is_one_block_wherever_it_is_raised(kernel, name) -> None:  # noqa: F811
    assert kernel.run(MADE) == "ok"
    assert kernel.run(f"raise made({name!r})") == "error"
    (error,) = kernel.outputs()
    assert (error["kind"], error["ename"]) == ("error", name)
    assert error["evalue"]
    assert error["traceback"][0].startswith(f"{name}: ")
    assert len(error["traceback"]) <= 6
    assert "Traceback" not in "".join(error["traceback"])


PYTHON = """
import llmkit
with llmkit.Client() as client:
    client.complete("hi", model={model!r})
"""


@pytest.mark.parametrize(("model", "name"), [("deaf", "ProviderUnreachable"), ("deaf,deaf2", "AllModelsFailed")])
def test_a_cell_of_python_shows_the_same_block(kernel, model, name) -> None:  # noqa: F811
    assert kernel.run(PYTHON.format(model=model)) == "error"
    (error,) = kernel.outputs()
    assert error["ename"] == name
    assert error["traceback"][0].startswith(f"{name}: ")
    assert any(line.startswith("next: ") for line in error["traceback"])


def test_an_error_stops_run_all(kernel, server) -> None:  # noqa: F811
    server.next(refused(400, "no such thing"))
    sent = [kernel.client.execute(code) for code in ("%%llm\nhi", "after = 1", "%%llm\nmore")]
    statuses = {}
    while len(statuses) < len(sent):
        reply = kernel.client.get_shell_msg(timeout=WAIT_S)
        if reply["parent_header"].get("msg_id") in sent:
            statuses[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
    assert [statuses[each] for each in sent] == ["error", "aborted", "aborted"]
    assert len(server.requests) == 1
    assert kernel.value("'after' in globals()") is False


def test_the_whole_traceback_hides_keys(kernel, server) -> None:  # noqa: F811
    server.next(refused(401, f"wrong key {KEY}"))
    assert kernel.run("%config LLMMagics.traceback = True") == "ok"
    try:
        assert kernel.run(f"%%llm -s '{KEY}'\nhi") == "error"
    finally:
        shown = kernel.messages, kernel.id
        assert kernel.run("%config LLMMagics.traceback = False") == "ok"
        kernel.messages, kernel.id = shown
    shown = "\n".join(kernel.outputs()[-1]["traceback"])
    assert "Traceback" in shown
    assert "client.py" in shown
    assert KEY not in shown
    assert KEY not in str([message for message in kernel.messages if message["msg_type"] != "execute_input"])


def test_what_looks_at_the_last_error_works(kernel, server) -> None:  # noqa: F811
    server.next(refused(400, "no such thing"))
    assert kernel.run("%%llm\nhi") == "error"
    assert kernel.run("import sys; print(type(sys.last_value).__name__)") == "ok"
    assert kernel.outputs()[0]["text"] == "InvalidRequest\n"
    assert kernel.run("%tb") == "ok"
    for mode in ("Plain", "Verbose", "Minimal", "Context"):
        server.next(refused(400, "no such thing"))
        kernel.run(f"%xmode {mode}")
        assert kernel.run("%%llm\nhi") == "error"
        assert kernel.outputs()[-1]["traceback"][0].startswith("InvalidRequest: ")


def notebook(*cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "python3"}
    for cell in made.cells:  # as nbformat 4.0 and converters have it
        cell.pop("id", None)
    made.nbformat_minor = 4
    return made


@pytest.fixture
def environment(folder, monkeypatch):
    for name, value in (("PYTHONPATH", ROOT), ("LLMKIT_OFFLINE", "1"), ("IPYTHONDIR", str(folder / "ipython"))):
        monkeypatch.setenv(name, value)
    return folder


def executed(made, folder):
    NotebookClient(made, timeout=2 * WAIT_S, resources={"metadata": {"path": str(folder)}}).execute()
    return made


def test_nbclient_stops_at_an_error_unless_the_cell_may_raise(environment) -> None:
    cells = "%load_ext llmkit", "%%llm -m deaf,deaf2\nhi", "print('after')"
    with pytest.raises(CellExecutionError, match="AllModelsFailed"):
        executed(notebook(*cells), environment)
    made = notebook(*cells)
    made.cells[1].metadata.tags = ["raises-exception"]
    ran = executed(made, environment)
    assert [output.output_type for output in ran.cells[1].outputs].count("error") == 1
    assert [output.output_type for output in ran.cells[1].outputs if output.output_type == "stream"] == []
    assert ran.cells[2].outputs[0].text == "after\n"


def test_nbval_knows_a_cell_that_may_raise(environment, monkeypatch) -> None:
    monkeypatch.setenv("LLMKIT_DISPLAY", "final")
    made = notebook("%load_ext llmkit", "%%llm -m deaf,deaf2\nhi", "%%llm --cache off\nhi")
    made.cells[1].metadata.tags = ["raises-exception"]
    nbformat.write(executed(made, environment), environment / "errors.ipynb")
    done = nbval(environment, dict(os.environ), "errors.ipynb")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


# -- in a terminal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(environment):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt", "--no-confirm-exit"],
        cwd=str(environment),
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        encoding="utf-8",
        timeout=WAIT_S,
        dimensions=(50, 200),
    )
    child.expect("In .1.: ")
    child.sendline("%load_ext llmkit")
    child.expect("In .2.: ")
    yield child
    child.close(force=True)


def test_a_terminal_shows_an_answer_and_one_block(terminal, server) -> None:
    terminal.sendline("get_ipython().run_cell_magic('llm', '', 'hi')")
    terminal.expect("In .3.: ")
    assert terminal.before.count("Hello there.") == 1
    assert terminal.before.count("tiny-1 · 7 → 5 tokens") == 1
    terminal.sendline("get_ipython().run_cell_magic('llm', '-m deaf,deaf2', 'hi')")
    terminal.expect("In .4.: ")
    assert terminal.before.count("AllModelsFailed: ") == 1
    assert "Traceback" not in terminal.before
    assert "next: " in terminal.before


def test_a_terminal_is_interrupted(terminal, server) -> None:
    gone = Gone()
    server.next(said("The beginning ", gone))
    terminal.sendline("get_ipython().run_cell_magic('llm', 'part <<', 'hi')")
    terminal.expect("The beginning ")
    assert gone.reached.wait(WAIT_S)
    terminal.sendintr()
    assert gone.left.wait(WAIT_S)
    terminal.expect("Interrupted: the connection is closed")
    terminal.expect("In .3.: ")
    terminal.sendline("print(part.text, part.outcome.status)")
    terminal.expect("The beginning  aborted")


# -- errors inside an error's path -----------------------------------------------------------------------------------------


class BrokenError(Exception):
    """What a view or a listener fails with here."""


def break_view(monkeypatch, method, error):
    """Let the views of cells fail at ``method``; what is returned fills when one did."""
    from llmkit.notebook import display

    original, failed = display.view_for, []

    def view_for(*args, **kwargs):
        view = original(*args, **kwargs)

        def fail(*_):
            failed.append(method)
            raise error

        setattr(view, method, fail)
        return view

    monkeypatch.setattr(display, "view_for", view_for)
    return failed


def nothing_is_left(shell, gone=None):
    session = LLMMagics.of(shell).session
    held = session.portal.run(session.client.budgets())["held"].astype(float).sum()
    assert held == 0
    if gone is not None and gone.reached.is_set():  # it may have failed before anything was sent
        assert gone.left.wait(WAIT_S)

    async def others():
        await asyncio.sleep(0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert session.portal.run(others()) == []
    assert {row["status"] for row in session.client.ledger.calls()} <= {"complete", "failed", "aborted"}


@pytest.mark.parametrize("error", [BrokenError("the view"), OSError(5, "stdout is closed"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["waiting", "growing", "done"])
def test_a_drawing_that_fails_leaves_nothing_open(shell, server, monkeypatch, method, error) -> None:
    failed = break_view(monkeypatch, method, error)
    gone = Gone()
    server.next(silent(gone) if method == "waiting" else said("The beginning ", gone if method == "growing" else CUT))
    result = shell.run_cell("%%llm part <<\nhi")
    assert not result.success
    assert failed
    nothing_is_left(shell, gone)


@pytest.mark.parametrize("play", [CUT, None])
def test_an_answer_that_cannot_be_shown_is_not_lost(shell, server, monkeypatch, capsys, play) -> None:
    break_view(monkeypatch, "done", BrokenError("the view"))
    server.next(said("What was paid for.", *([play] if play else [])))
    assert not shell.run_cell("%%llm kept <<\nhi").success
    assert shell.user_ns["kept"].text == "What was paid for."
    shown = capsys.readouterr().out
    assert ("StreamBroken: " if play else "NotShown: the answer could not be shown: BrokenError: the view") in shown
    assert "Traceback" not in shown
    nothing_is_left(shell)


@pytest.mark.parametrize("play", [CUT, None])
def test_a_footer_that_fails_leaves_nothing_open(shell, server, monkeypatch, play) -> None:
    from llmkit.notebook import footer

    def fail(*_, **__):
        raise BrokenError

    for name in ("of_reply", "of_attempts"):
        monkeypatch.setattr(footer, name, fail)
    server.next(said("The beginning ", *([play] if play else [])))
    assert not shell.run_cell("%%llm\nhi").success
    nothing_is_left(shell)


def test_a_displayhook_that_fails_leaves_nothing_open(shell, server, monkeypatch) -> None:
    def fail(_):
        raise BrokenError

    monkeypatch.setattr(shell.displayhook, "update_user_ns", fail)
    assert not shell.run_cell("%%llm\nhi").success
    server.next(said("The beginning ", CUT))
    assert not shell.run_cell("%%llm\nhi again").success
    nothing_is_left(shell)


def test_an_error_that_cannot_be_shown_is_still_said(shell, server, monkeypatch, capsys) -> None:
    def fail(self):
        raise BrokenError("no block")

    monkeypatch.setattr(errors.LLMKitError, "block", fail)
    assert not shell.run_cell("%%llm -m deaf\nhi").success
    shown = capsys.readouterr()
    assert "ProviderUnreachable" in shown.out + shown.err
    assert llmkit.LLMKitError in shell.custom_exceptions  # the next one is shown well
    nothing_is_left(shell)


def test_a_stream_of_python_whose_reader_fails_leaves_nothing_open(folder, server) -> None:
    gone = Gone()
    server.next(said("The beginning ", gone))
    client = llmkit.Client()

    def read():
        with client.stream("hi") as reply:
            for _ in reply:
                raise BrokenError

    with pytest.raises(BrokenError):
        read()
    assert gone.left.wait(WAIT_S)
    assert client.budgets()["held"].astype(float).sum() == 0
    client.close()
    portal.leave(client)
