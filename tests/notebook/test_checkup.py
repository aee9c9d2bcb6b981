"""``%llm doctor``: what it says, what it never says, and that it never takes long."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from llmkit import doctor
from llmkit.notebook import checkup
from llmkit.notebook.magics import LLMMagics

KEY = "sk-test-key-of-nobody-0123456789"


@pytest.fixture(autouse=True)
def offline(folder, monkeypatch):
    monkeypatch.setenv("LLMKIT_OFFLINE", "1")


def found(shell):
    return [(each.subject, each.state, each.text) for each in checkup.findings(LLMMagics.of(shell))]


def of(shell, subject):
    return [(state, text) for name, state, text in found(shell) if name == subject]


def said(shell, capsys):
    capsys.readouterr()
    assert shell.run_cell("%llm doctor").success
    return capsys.readouterr().out


def test_all_that_a_notebook_and_a_shell_know(shell, capsys) -> None:
    out = said(shell, capsys)
    subjects = [line[6:].split()[0] for line in out.splitlines() if line]
    for subject in ("frontend", "magics", "config", "display", "calls", "cache", "llmkit", "packages", "settings"):
        assert subject in subjects
    for subject in ("keys", "local", "store", "prices", "model", "caps"):
        assert subject in subjects
    assert "WRONG" not in out
    assert "nothing is set by %config" in out
    assert "tiny (from llmkit.toml)" in out
    assert "$0.50 a request, $5 a session, $20 a day" in out
    assert max(len(line) for line in out.splitlines()) < 520


def test_no_key_is_shown_wherever_it_stands(shell, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    shell.run_cell(f"%config LLMMagics.user = '{KEY}'")
    out = said(shell, capsys)
    assert "OPENAI_API_KEY is set" in out
    assert KEY not in out
    assert "secret" not in out


@pytest.mark.parametrize("cost, named", [("0.0000001", "$0.0000001"), ("'0.1'", "$0.10")])
def test_what_a_cell_may_cost_is_said_as_people_write_it(shell, cost, named) -> None:
    shell.run_cell(f"%config LLMMagics.max_cost = {cost}")
    assert of(shell, "caps")[0][1].startswith(f"{named} a cell (as %config says)")


def test_what_config_says_is_named(shell, capsys) -> None:
    shell.run_cell("%config LLMMagics.max_cost = 0.25\n%llm use deaf")
    assert of(shell, "config") == [("ok", "max_cost = 0.25, model = 'deaf'")]
    assert of(shell, "caps")[0][1].startswith("$0.25 a cell (as %config says); by default, for paid models: ")


def test_a_name_that_somebody_took_is_wrong_and_a_reload_mends_it(shell) -> None:
    shell.register_magic_function(lambda line: "mine", "line", "llm")
    ((state, text),) = of(shell, "magics")
    assert state == "wrong"
    assert text.startswith("%llm is another's")
    shell.run_line_magic("reload_ext", "llmkit")
    assert of(shell, "magics")[0][0] == "ok"


def test_another_handler_of_errors_is_noted(shell) -> None:
    assert of(shell, "errors") == []
    shell.set_custom_exc((ZeroDivisionError,), lambda *_: None)
    assert of(shell, "errors")[0][0] == "note"


def test_settings_that_changed_or_broke_since_loading(shell, folder, server) -> None:
    file = folder / "llmkit.toml"
    file.write_text(server.settings(), "utf-8")
    os.utime(file, (2e9, 2e9))
    assert ("note", f"{file} has changed since llmkit was loaded; %reload_ext llmkit reads it") in of(shell, "settings")
    file.write_text("modle = 3\n", "utf-8")
    states = dict(of(shell, "settings"))
    assert "line 1" in states["wrong"]


def test_settings_that_were_wrong_from_the_beginning(bare, folder, capsys) -> None:
    (folder / "llmkit.toml").write_text("modle = 3\n", "utf-8")
    bare.run_line_magic("load_ext", "llmkit")
    out = said(bare, capsys)
    assert "WRONG settings" in out
    assert out.endswith("What is WRONG has to be mended.\n")


def test_a_cache_that_is_off_and_a_ledger_in_memory_are_said(shell, folder) -> None:
    shell.run_cell("%llm cache off")
    assert of(shell, "cache")[0][0] == "note"
    LLMMagics.of(shell).session.client.ledger.notice = "kept in memory only"
    assert of(shell, "ledger") == [("wrong", "kept in memory only")]


def test_where_it_runs(shell, monkeypatch) -> None:
    assert of(shell, "frontend")[0][1].startswith("IPython ")
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    assert of(shell, "frontend")[0][1].endswith("a client of the Jupyter protocol")
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/ana/report.ipynb")
    assert of(shell, "frontend")[0][1].endswith("Jupyter, report.ipynb")
    monkeypatch.setenv("VSCODE_PID", "1")
    assert of(shell, "frontend")[0][1].endswith("VS Code")


def test_one_that_hangs_or_fails_hides_no_other_and_holds_up_nobody(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.2)
    never = threading.Event()

    def hangs():
        never.wait(30)
        return []

    probes = [
        ("slow", hangs),
        ("wrong", lambda: [1 / 0]),
        ("good", lambda: [doctor.Finding("good", "ok", "is")]),
    ]
    assert [(each.subject, each.state, each.text) for each in doctor._side_by_side(probes)] == [
        ("slow", "wrong", "nothing was heard within 0.2 s"),
        ("wrong", "wrong", "it could not be looked at: ZeroDivisionError: division by zero"),
        ("good", "ok", "is"),
    ]
    never.set()


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for(shell, capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{deaf.getsockname()[1]}")
        assert "store" in said(shell, capsys)


def test_words_have_no_place_there(shell, capsys) -> None:
    assert not shell.run_cell("%llm doctor quickly").success
    assert "'quickly' has no place here" in capsys.readouterr().out
