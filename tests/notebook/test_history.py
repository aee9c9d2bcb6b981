"""``%llm why`` and ``%llm show``: the life of a call, and its answer again, here and in another kernel."""

from __future__ import annotations

import signal
import sqlite3
import stat
import threading

import pytest

import llmkit
from llmkit.notebook.asking import Interrupted
from llmkit.notebook.magics import LLMMagics
from llmkit.state import answers
from tests.notebook.server import CUT, Gone, refused, said
from tests.notebook.test_commands import mistake
from tests.notebook.test_commands import said as told
from tests.notebook.test_magics import run


def answers_file():
    return answers.answers_path("sqlite")


def after(shell):
    """As another kernel would find it."""
    run(shell, "%unload_ext llmkit")
    run(shell, "%load_ext llmkit")


# -- why ---------------------------------------------------------------------------------------------------------------


def test_why_tells_the_life_of_a_call(shell, server) -> None:
    server.next(refused(503, "busy", retry_after="0.1"))
    run(shell, "%%llm a << --user ana --tag app=docs\nWhat is it?")
    text = told(shell, "%llm why")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[1:3] == ["asked for tiny by ana, app=docs", "question: What is it?"]
    kinds = [line.split(" s  ", 1)[1].split(":")[0] for line in lines[3:-2]]
    assert kinds == [
        "cache",
        "budget",
        "attempt 1",
        "attempt 1",
        "budget",
        "waiting 0.1 s",
        "budget",
        "attempt 2",
        "attempt 2",
        "budget",
    ]
    assert "cache: a miss (use)" in text
    assert "held for attempt 1 (session: $0 of $5 spent" in text
    assert "attempt 1: vllm:tiny failed, HTTP 503" in text
    assert "ProviderOverloaded: vllm:tiny answered 503: busy" in text
    assert "what was held for attempt 1 is given back" in text
    assert "attempt 2: vllm:tiny-1 complete, HTTP 200 after" in text
    assert "(first token after" in text
    assert "attempt 2 settled at $0.000017, 12 tokens" in text
    assert lines[-2].startswith("complete after")
    assert lines[-1].startswith("shown as: tiny-1 · 7 → 5 tokens · $0.000017")
    request_id = shell.user_ns["a"].request_id
    run(shell, "%%llm\nsomething else")
    assert told(shell, f"%llm why {request_id[:16]}") == text
    after(shell)
    assert told(shell, f"%llm why {request_id}") == text


def test_why_tells_where_an_answer_was_found(shell) -> None:
    run(shell, "%%llm\nhi")
    run(shell, "%%llm\nhi")
    text = told(shell, "%llm why")
    assert "cache: a hit in " in text
    assert "saved $0.000017" in text
    assert "attempt" not in text
    assert "answered by: cache" in text
    run(shell, "%%llm --cache refresh\nhi")
    assert "not looked up (refresh" in told(shell, "%llm why")
    run(shell, "%%llm --cache off\nhi")
    assert "neither looks nor stores" in told(shell, "%llm why")


def test_why_tells_which_links_were_left(shell, server) -> None:
    server.next(refused(401, "no"))
    run(shell, "%%llm -m tiny,deaf\nhi")
    text = told(shell, "%llm why")
    assert "choice: vllm:tiny is left for vllm:deaf: AuthenticationError" in text


def test_why_tells_what_a_budget_refused(shell) -> None:
    run(shell, "%llm budget session=1token")
    assert run(shell, "%%llm\nhi").error is not None
    text = told(shell, "%llm why")
    assert "budget: no room for" in text
    assert "in session: 0 tokens of 1 token spent" in text
    assert "rejected" in text
    assert "BudgetExceeded" in text


def test_why_of_a_call_that_python_made_comes_from_the_ledger(shell, server) -> None:
    with llmkit.Client() as client:
        request_id = client.complete("from Python").request_id
    text = told(shell, f"%llm why {request_id}")
    assert "attempt 1: vllm:tiny complete, HTTP 200 after" in text
    assert "7 → 5 tokens, $0.000017" in text
    assert "what the ledger knows" in text
    assert "not kept" in mistake(shell, f"%llm show {request_id}")


def test_why_without_an_id_is_the_last_of_this_kernel(shell) -> None:
    run(shell, "%%llm a <<\nhi")
    assert shell.user_ns["a"].request_id in told(shell, "%llm why")


def test_why_knows_when_there_is_nothing_to_tell(shell) -> None:
    assert "no call has been made yet" in mistake(shell, "%llm why")
    assert "no such call" in mistake(shell, "%llm why ffffffffffff")
    assert "has no place" in mistake(shell, "%llm why a b")


def test_an_ambiguous_id_names_the_candidates(shell) -> None:
    ids = []
    for text in "abc":
        run(shell, f"%%llm a <<\n{text}")
        ids.append(shell.user_ns["a"].request_id)
    for command in ("why", "show"):
        error = mistake(shell, f"%llm {command} {ids[0][:6]}")
        assert "several calls begin with" in error
        assert all(each in error for each in ids)


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_renders_an_answer_again_also_in_a_new_kernel(shell, server) -> None:
    server.next(said("*The* answer, $5."))
    first = run(shell, "%%llm a <<\nhi").stdout
    request_id = shell.user_ns["a"].request_id
    run(shell, "%%llm\nanother")
    assert told(shell, f"%llm show {request_id[:-4]}") == first
    assert told(shell, "%llm show").startswith("Hello there.\n")
    after(shell)
    assert told(shell, f"%llm show {request_id}") == first
    assert told(shell, "%llm show").startswith("Hello there.\n")
    assert len(server.requests) == 2


def test_a_broken_answer_is_kept_and_marked(shell, server) -> None:
    server.next(said("The first half ", CUT))
    run(shell, "%%llm\nhi")
    text = told(shell, "%llm show")
    assert text.startswith("The first half")
    assert "broken off" in text
    assert "StreamBroken" in text
    why = told(shell, "%llm why")
    assert "broken off; 15 characters of the answer are kept: %llm show" in why


def test_an_interrupted_answer_is_kept_and_marked(shell, server) -> None:
    gone = Gone()
    server.next(said("The beginning ", gone))

    def interrupt():
        gone.reached.wait(30)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    shown = run(shell, "%%llm\nhi")
    thread.join()
    assert isinstance(shown.error, Interrupted)
    text = told(shell, "%llm show")
    assert text.startswith("The beginning")
    assert "interrupted" in text


def test_a_quiet_answer_can_be_shown(shell) -> None:
    assert run(shell, "%%llm a << --quiet\nhi").stdout == ""
    assert told(shell, "%llm show").startswith("Hello there.")


def test_a_cell_that_asked_nothing_leaves_nothing(shell) -> None:
    run(shell, "%%llm\n{{ nothing }}")
    assert "no cell of this" in mistake(shell, "%llm show")


def test_the_question_is_kept_without_keys_and_bounded(shell) -> None:
    run(shell, "%%llm\nmy key is sk-proj-abcdEFGH1234567890abcd " + "x" * 30_000)
    (record,) = LLMMagics.of(shell).session.history.answers.find("")
    assert b"abcdEFGH" not in record.record
    assert len(record.record) < 25_000
    assert b"10," in record.record  # and so many characters more
    assert told(shell, "%llm show").startswith("Hello there.")


def test_the_file_is_private_and_can_be_emptied(shell) -> None:
    run(shell, "%%llm\na very private question")
    path = answers_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "1 answer is removed" in told(shell, "%llm show clear")
    assert b"very private" not in b"".join(each.read_bytes() for each in path.parent.glob("ledger.answers*"))
    assert "no cell" in mistake(shell, "%llm show")


@pytest.mark.parametrize("line", ["[notebook]\nkeep = false\n", "[cache]\npersist = false\n"])
def test_one_setting_keeps_it_off_the_disk(bare, folder, server, line) -> None:
    (folder / "llmkit.toml").write_text(server.settings() + line, "utf-8")
    run(bare, "%load_ext llmkit")
    run(bare, "%%llm\na very private question")
    assert told(bare, "%llm show").startswith("Hello there.")
    assert not answers_file().exists()
    after(bare)
    assert "no cell" in mistake(bare, "%llm show")


def test_what_was_written_before_can_be_forgotten_when_nothing_is_written_any_more(shell, folder, server) -> None:
    run(shell, "%%llm\na very private question")
    (folder / "llmkit.toml").write_text(server.settings() + "[notebook]\nkeep = false\n", "utf-8")
    after(shell)
    run(shell, "%%llm\nanother question")
    assert "2 answers are removed" in told(shell, "%llm show clear")
    assert b"very private" not in b"".join(each.read_bytes() for each in answers_file().parent.glob("ledger.answers*"))


def test_garbage_in_the_file_is_not_shown(shell) -> None:
    run(shell, "%%llm a <<\nhi")
    request_id = shell.user_ns["a"].request_id
    for garbage in (b"no json", b"[]", b'{"request_id": 1}', b"\xff\xfe", b"[" * 100_000):
        with sqlite3.connect(answers_file()) as connection:
            connection.execute("UPDATE answers SET record = ?", (garbage,))
        connection.close()
        assert "was not kept" in mistake(shell, "%llm show")
        assert "what the ledger knows" in told(shell, f"%llm why {request_id}")


def test_a_store_that_cannot_be_written_costs_no_answer(shell, monkeypatch, caplog) -> None:
    def broken(*_):
        raise llmkit.LLMKitError("the disk is full")

    monkeypatch.setattr(answers.SQLiteAnswers, "put", broken)
    assert run(shell, "%%llm\nhi").error is None
    assert run(shell, "%%llm\nho").error is None
    assert caplog.text.count("in memory only") == 1
    assert told(shell, "%llm show").startswith("Hello there.")


def test_what_an_answer_holds_does_nothing_to_a_terminal(shell, server) -> None:
    server.next(said("\x1b]0;owned\x07bad\x1b[2J"))
    run(shell, "%%llm\nhi \x1b[2J")
    assert "\x1b" not in told(shell, "%llm show")
    assert "\x1b" not in told(shell, "%llm why")


def test_a_whole_answer_that_does_not_fit_was_not_broken_off(shell, server) -> None:
    server.next(said("no"), said("never"))
    run(shell, "%%llm --schema 'name'\nwho?")
    assert "  failed; 5 characters of the answer are kept: %llm show" in told(shell, "%llm why")
    server.next(refused(401))
    run(shell, "%%llm\nhi")
    assert "  failed; no answer came: %llm show" in told(shell, "%llm why")
