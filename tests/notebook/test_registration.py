"""What `%unload_ext` and `%reload_ext` leave behind: nothing of llmkit's, everything of others'."""

from __future__ import annotations

import atexit
import gc
import threading
from pathlib import Path

import pytest
from IPython.core.magic import Magics, line_cell_magic, magics_class

import llmkit
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import Gone, Step, said, silent

WAIT_S = 30


def threads():
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("Thread-"))


def descriptors():
    """What is open: files and sockets, of llmkit's doing and the test's own."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(each.readlink()).partition(":[")[0])
        except OSError:  # the one this listing was made with
            continue
    return sorted(found)


def registered(shell):
    """Everything in a shell that an extension could leave something in."""
    manager = shell.magics_manager
    names = {kind: dict(functions) for kind, functions in manager.magics.items()}
    hooks = {name: list(functions) for name, functions in shell.events.callbacks.items()}
    completers = [getattr(each, "matcher_identifier", str(each)) for each in shell.Completer.matchers]
    strdispatchers = {name: (dict(d.strs), dict(d.regexs)) for name, d in shell.strdispatchers.items()}
    transformers = list(shell.input_transformers_cleanup), list(shell.input_transformers_post)
    formatters = {
        k: (dict(f.type_printers), dict(f.deferred_printers)) for k, f in shell.display_formatter.formatters.items()
    }
    configurables = [type(each).__name__ for each in shell.configurables]
    others = (
        shell.custom_exceptions,
        getattr(shell, "CustomTB", None),
        dict(manager.registry),
        list(shell.ast_transformers),
    )
    return names, hooks, completers, strdispatchers, transformers, formatters, configurables, others


@pytest.fixture
def at_exit(monkeypatch):
    """What is to be called at the interpreter's end, of what is registered from now on."""
    called, register, unregister = [], atexit.register, atexit.unregister

    def noted(function, *args, **kwargs):
        called.append(function)
        return register(function, *args, **kwargs)

    def forgotten(function):
        called[:] = [each for each in called if each != function]
        unregister(function)

    monkeypatch.setattr(atexit, "register", noted)
    monkeypatch.setattr(atexit, "unregister", forgotten)
    return called


def parts_left(before, after):
    return [(a, b) for a, b in zip(before, after, strict=True) if a != b]


def test_unloading_leaves_nothing_behind(shell, server, at_exit, capsys) -> None:
    shell.run_line_magic("unload_ext", "llmkit")  # once before: modules that are imported late register once
    for _ in range(2):
        at_exit.clear()
        before, running, opened = registered(shell), threads(), descriptors()
        shell.run_line_magic("load_ext", "llmkit")
        assert shell.run_cell("%%llm a <<\nhi").success
        assert shell.run_cell("%llm").success
        assert "llmkit" in threads()
        assert len(at_exit) > 0
        shell.run_line_magic("unload_ext", "llmkit")
        gc.collect()
    assert at_exit == []
    assert parts_left(before, registered(shell)) == []
    assert threads() == running
    assert [each for each in descriptors() if "/" in each or "eventpoll" in each] == [
        each for each in opened if "/" in each or "eventpoll" in each
    ]
    capsys.readouterr()
    shell.run_line_magic("config", "")
    assert "LLMMagics" not in capsys.readouterr().out
    assert shell.user_ns["a"].text == "Hello there."
    assert "".join(chunk.text for chunk in shell.user_ns["a"]) == "Hello there."  # needs no loop
    assert "llmkit" not in threads()


def test_twenty_reloads_leave_all_counts_where_they_were(shell, server, at_exit) -> None:
    def once():
        shell.run_line_magic("reload_ext", "llmkit")
        assert shell.run_cell("%%llm --cache off\nhi").success

    once()
    once()
    gc.collect()
    before, running, opened, ending = registered(shell), threads(), len(descriptors()), len(at_exit)
    for _ in range(20):
        once()
    gc.collect()
    after = registered(shell)
    assert parts_left(before[1:-1], after[1:-1]) == []
    assert {kind: set(names) for kind, names in before[0].items()} == {kind: set(n) for kind, n in after[0].items()}
    assert after[-1][0] == before[-1][0]
    assert len(at_exit) == ending
    assert [type(each).__name__ for each in shell.configurables].count("LLMMagics") == 1
    assert threads() == running
    assert len(descriptors()) <= opened + 2  # the server's end of a connection that it has not seen closed


def test_a_plain_client_keeps_the_loop_and_goes_on(shell, server) -> None:
    assert shell.run_cell("%%llm\nhi").success
    with llmkit.Client() as client:
        assert client.complete("hello").text == "Hello there."
        shell.run_line_magic("unload_ext", "llmkit")
        assert "llmkit" in threads()
        assert client.complete("hello again").text == "Hello there."
    assert "llmkit" not in threads()


def test_a_stream_from_python_outlives_a_reload_and_its_client(shell, server) -> None:
    step = Step()
    server.next(said("The beginning ", step, "and the end."))
    reply = llmkit.Client().stream("hello")  # nobody holds the client but what arrives
    gc.collect()
    shell.run_line_magic("reload_ext", "llmkit")
    shell.run_line_magic("unload_ext", "llmkit")
    step.go.set()
    assert "".join(chunk.text for chunk in reply) == "The beginning and the end."
    assert reply.outcome.status == "complete"


def test_unloading_ends_the_cell_of_another_thread(shell, server, capsys) -> None:
    gone = Gone()
    server.next(silent(gone))
    ended = []

    def cell():
        try:
            shell.run_cell_magic("llm", "part <<", "hi")
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=cell)
    thread.start()
    assert gone.reached.wait(WAIT_S)
    ledger = LLMMagics.of(shell).session.client.ledger
    shell.run_line_magic("unload_ext", "llmkit")
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert gone.left.wait(WAIT_S)
    assert [type(error).__name__ for error in ended] == ["Interrupted"]
    assert [row["status"] for row in ledger.calls()] == ["aborted"]
    ledger.close()
    assert "llmkit" not in threads()


@pytest.mark.parametrize("kind", ["line", "cell"])
def test_names_that_another_extension_had_are_its_own_again(bare, folder, kind) -> None:
    @magics_class
    class Other(Magics):
        @line_cell_magic
        def llm(self, line, cell=None):
            return "the other's"

    bare.register_magics(Other)
    other = bare.magics_manager.magics[kind]["llm"]
    bare.run_line_magic("load_ext", "llmkit")
    assert bare.magics_manager.magics[kind]["llm"] != other
    bare.run_line_magic("unload_ext", "llmkit")
    assert bare.magics_manager.magics[kind]["llm"] == other
    assert bare.run_line_magic("llm", "") == "the other's"


def test_a_name_that_somebody_took_since_stays_theirs(shell) -> None:
    shell.register_magic_function(lambda line: "mine", "line", "llm")
    shell.run_line_magic("unload_ext", "llmkit")
    assert shell.run_line_magic("llm", "") == "mine"


def test_a_handler_put_over_ours_stays(shell, capsys) -> None:
    ours = shell.CustomTB
    seen = []

    def over(shell, kind, error, traceback, tb_offset=None):
        seen.append(kind)
        ours(kind, error, traceback, tb_offset)

    shell.set_custom_exc((llmkit.LLMKitError, ZeroDivisionError), over)
    theirs = shell.CustomTB
    shell.run_line_magic("unload_ext", "llmkit")
    assert shell.CustomTB is theirs
    shell.run_cell("raise __import__('llmkit').ConfigError('no')")
    assert seen == [llmkit.ConfigError]
    assert "ConfigError: no" in capsys.readouterr().out


def test_a_reload_reads_the_files_again_and_keeps_what_was_set(shell, folder, server, capsys) -> None:
    shell.run_cell("%config LLMMagics.max_tokens = 7\n%llm use deaf")
    (folder / "llmkit.toml").write_text(server.settings(budget="{ request = { usd = 0.25 } }"), "utf-8")
    capsys.readouterr()
    shell.run_line_magic("reload_ext", "llmkit")
    greeting = capsys.readouterr().out
    assert "model deaf (as %config says)" in greeting
    assert "$0.25 a request" in greeting
    assert LLMMagics.of(shell).max_tokens == 7
    shell.run_line_magic("unload_ext", "llmkit")
    shell.run_line_magic("load_ext", "llmkit")  # from the beginning, but for what IPython keeps itself
    assert (LLMMagics.of(shell).model, LLMMagics.of(shell).max_tokens) == ("", 7)


def test_what_is_carried_outlives_a_reload_only(shell) -> None:
    LLMMagics.of(shell).carried["kept"] = 1
    shell.run_line_magic("reload_ext", "llmkit")
    assert LLMMagics.of(shell).carried == {"kept": 1}
    shell.run_line_magic("unload_ext", "llmkit")
    shell.run_line_magic("load_ext", "llmkit")
    assert LLMMagics.of(shell).carried == {}


def test_a_value_that_config_refused_does_not_stop_a_reload(shell, capsys) -> None:
    shell.run_cell("%config LLMMagics.temperature = 9\n%config LLMMagics.max_tokens = 7")
    assert LLMMagics.of(shell).temperature is None
    capsys.readouterr()
    assert shell.run_cell("%reload_ext llmkit").success
    assert "LLMMagics.temperature is not set, since its value is wrong: " in capsys.readouterr().err
    assert (LLMMagics.of(shell).temperature, LLMMagics.of(shell).max_tokens) == (None, 7)
    assert [type(each).__name__ for each in shell.configurables].count("LLMMagics") == 1


def test_errors_are_one_block_after_a_reload_too(shell, capsys) -> None:
    kind = llmkit.BudgetExceeded
    shell.run_line_magic("reload_ext", "llmkit")
    assert llmkit.BudgetExceeded is kind
    capsys.readouterr()
    shell.run_cell("%%llm -m deaf,deaf2\nhi")
    shown = capsys.readouterr().out
    assert shown.count("AllModelsFailed") == 1
    assert "Traceback" not in shown


def test_what_fails_while_unloading_keeps_nothing_else(shell, caplog) -> None:
    magics = LLMMagics.of(shell)
    magics.undo.append(lambda: 1 / 0)
    shell.run_line_magic("unload_ext", "llmkit")
    assert LLMMagics.of(shell) is None
    assert llmkit.LLMKitError not in shell.custom_exceptions
    assert "unloading" in caplog.text
