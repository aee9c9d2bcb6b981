"""``%%llm --chat``: turns, the cells they belong to, and what is remembered."""

from __future__ import annotations

import base64
import signal
import threading

import pytest

from llmkit.call import Message
from llmkit.errors import ConfigError, ContextTooLong
from llmkit.notebook.chats import Chats, Place, here, with_next_step
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import CUT, Gone, refused, said
from tests.notebook.test_commands import mistake
from tests.notebook.test_commands import said as told
from tests.notebook.test_magics import run


class Cells:
    """A shell whose frontend says which cell asks."""

    def __init__(self, shell):
        self.shell = shell
        self.runs = 0

    def __call__(self, cell, code):
        self.runs += 1
        self.shell.get_parent = lambda: {"header": {"msg_id": f"m{self.runs}"}, "metadata": {"cellId": cell}}
        return run(self.shell, code)


@pytest.fixture
def cells(shell):
    cells = Cells(shell)
    yield cells
    vars(shell).pop("get_parent", None)


def questions(shell, name="trip"):
    chat = LLMMagics.of(shell).chats.get(name)
    return [turn.asked[-1].text for turn in chat.turns] if chat else None


def sent(server, at=-1):
    return [(m["role"], m["content"]) for m in server.requests[at]["messages"]]


def test_a_chat_goes_on_and_other_cells_know_nothing_of_it(shell, server) -> None:
    server.next(said("Lyon."))
    run(shell, "%%llm --chat trip\nWhere to?")
    run(shell, "%%llm\nWhere to?!")
    assert sent(server) == [("user", "Where to?!")]
    run(shell, "%%llm --chat trip\nAnd then?")
    assert sent(server) == [("user", "Where to?"), ("assistant", "Lyon."), ("user", "And then?")]
    run(shell, "%%llm --chat other\nAnd then?")
    assert sent(server) == [("user", "And then?")]
    assert questions(shell) == ["Where to?", "And then?"]


def test_a_cell_that_is_run_again_takes_its_turn_anew(cells, shell, server) -> None:
    for number in "1234":
        cells(f"c{number}", f"%%llm --chat trip\nquestion {number}")
    shown = cells("c2", "%%llm --chat trip\nquestion two")
    assert sent(server) == [("user", "question 1"), ("assistant", "Hello there."), ("user", "question two")]
    note = "the chat trip goes on from turn 2; 2 later turns are left out (%llm chat trip undo brings them back)"
    assert note in shown.stdout
    assert questions(shell) == ["question 1", "question two"]
    assert told(shell, "%llm chat trip undo") == "llmkit: the chat trip has 4 turns again\n"
    assert questions(shell) == ["question 1", "question 2", "question 3", "question 4"]
    assert "left out none" in mistake(shell, "%llm chat trip undo")


def test_one_turn_that_is_left_out_is_brought_back_as_one(cells) -> None:
    for name in "ab":
        cells(name, f"%%llm --chat trip\n{name}")
    note = "1 later turn is left out (%llm chat trip undo brings it back)"
    assert note in cells("a", "%%llm --chat trip\nc").stdout


def test_the_last_cell_again_says_nothing_of_turns(cells, shell) -> None:
    cells("c1", "%%llm --chat trip\nquestion 1")
    shown = cells("c1", "%%llm --chat trip\nquestion one")
    assert "the chat" not in shown.stdout
    assert questions(shell) == ["question one"]


def test_run_all_twice_is_the_same_conversation_and_costs_nothing(cells, shell, server) -> None:
    for _ in range(2):
        for number in "123":
            shown = cells(f"c{number}", f"%%llm --chat trip\nquestion {number}")
    assert len(server.requests) == 3
    assert "cache, saved" in shown.stdout
    assert questions(shell) == ["question 1", "question 2", "question 3"]


def test_a_loop_in_one_cell_asks_one_turn_after_the_other(cells, shell, server) -> None:
    loop = 'for each in "ab":\n    get_ipython().run_cell_magic("llm", "--chat trip", f"question {each}")'
    cells("c1", loop)
    assert questions(shell) == ["question a", "question b"]
    cells("c1", loop)
    assert questions(shell) == ["question a", "question b"]
    assert len(server.requests) == 2


def test_without_cell_ids_each_question_is_a_new_turn(shell) -> None:
    assert here(shell) == Place(None, None)
    run(shell, "%%llm --chat trip\nagain")
    run(shell, "%%llm --chat trip\nagain")
    assert questions(shell) == ["again", "again"]


@pytest.mark.parametrize(
    "parent", [None, {}, {"metadata": None, "header": {}}, {"metadata": {"cellId": 7}, "header": {}}]
)
def test_a_frontend_that_says_something_else_is_one_that_says_nothing(parent) -> None:
    class Shell:
        def get_parent(self):
            return parent

    assert here(Shell()) == (None, None)


def test_a_system_prompt_holds_from_its_turn_on(cells, shell, server) -> None:
    shell.run_line_magic("config", "LLMMagics.system = 'As configured.'")
    cells("c1", "%%llm --chat trip\none")
    assert sent(server)[0] == ("system", "As configured.")
    shell.run_line_magic("config", "LLMMagics.system = 'Changed since.'")
    cells("c2", "%%llm --chat trip\ntwo")
    assert sent(server)[0] == ("system", "As configured.")
    cells("c3", "%%llm --chat trip -s Terse.\nthree")
    assert [role for role, _ in sent(server)] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert sent(server)[0] == ("system", "Terse.")
    cells("c4", "%%llm --chat trip\nfour")
    assert sent(server)[0] == ("system", "Terse.")
    cells("c2", "%%llm --chat trip\ntwo again")
    assert sent(server)[0] == ("system", "As configured.")


def test_a_cell_that_is_not_answered_adds_no_turn(cells, shell, server) -> None:
    cells("c1", "%%llm --chat trip\none")
    server.next(refused(400))
    cells("c2", "%%llm --chat trip\nrefused")
    server.next(said("half ", CUT))
    cells("c3", "%%llm --chat trip\nbroken")
    cells("c4", "%%llm --chat trip\n{{ nothing }}")
    cells("c5", "%%llm --chat trip --cache only\nnot stored")
    assert questions(shell) == ["one"]
    server.next(refused(400))
    cells("c1", "%%llm --chat trip\none, refused")  # what was there before stays
    assert questions(shell) == ["one"]


def test_an_interrupted_cell_adds_no_turn(shell, server) -> None:
    gone = Gone()
    server.next(said("The beginning ", gone))
    thread = threading.Thread(target=lambda: (gone.reached.wait(30), signal.raise_signal(signal.SIGINT)))
    thread.start()
    run(shell, "%%llm --chat trip\nhi")
    thread.join()
    assert questions(shell) is None


def test_the_text_for_outages_is_no_turn(bare, folder, server) -> None:
    (folder / "llmkit.toml").write_text(server.settings() + '[degraded]\ntext = "Later."\n', "utf-8")
    run(bare, "%load_ext llmkit")
    assert "degraded" in run(bare, "%%llm -m deaf --chat trip\nhi").stdout
    assert questions(bare) is None


def test_a_prompt_that_is_too_long_names_the_way_out() -> None:
    error = ContextTooLong("too long", tokens=9, window=8)
    with_next_step(error, "trip")
    assert "%llm chat trip clear" in (error.next_step or "")
    other = ContextTooLong("too long", tokens=9, window=8)
    with_next_step(other, None)
    assert other.next_step != error.next_step


def test_chats_are_listed_shown_and_forgotten(shell, server) -> None:
    assert told(shell, "%llm chat").startswith("no chat yet")
    server.next(said("Lyon\x1b[2J."))
    run(shell, "%%llm --chat trip -s Terse.\nWhere to in the spring, with two children and no car?  I wonder.")
    run(shell, "%%llm --chat work\nhi")
    listed = told(shell, "%llm chat").splitlines()
    assert listed[0].split() == ["chat", "turns", "tokens", "begins", "with"]
    assert listed[1].startswith("trip      1      12  Where to in the spring, with two children")
    assert listed[1].endswith("…")
    shown = told(shell, "%llm chat trip")
    assert shown.splitlines()[0] == "system: Terse."
    assert "1. you: Where to" in shown
    assert "model: Lyon.\n" in shown
    assert "\x1b" not in shown
    assert told(shell, "%llm chat trip clear") == "llmkit: the chat trip is forgotten, 1 turn\n"
    assert "there is no chat 'trip'" in mistake(shell, "%llm chat trip")
    assert "there is no chat 'trip'" in mistake(shell, "%llm chat trip clear")
    assert "write %llm chat" in (run(shell, "%llm chat work wipe").error.next_step or "")


@pytest.mark.parametrize("name", ["a b", "", "-x", "a\nb", "x" * 65, "_a", "a;b"])
def test_a_name_is_a_word(name) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a chat"):
        Chats().messages(name, "hi")


def test_a_chat_ends_with_unloading(shell) -> None:
    run(shell, "%%llm --chat trip\nhi")
    run(shell, "%unload_ext llmkit")
    run(shell, "%load_ext llmkit")
    assert LLMMagics.of(shell).chats.names == []


def test_looking_at_a_question_changes_nothing() -> None:
    chats = Chats()
    assert chats.messages("trip", "hi") == [Message("user", "hi")]
    assert chats.names == []


def test_parts_of_a_question_stay_with_it(cells, shell, server) -> None:
    """Pictures go along in every later turn."""
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    chats = LLMMagics.of(shell).chats
    run(shell, "%%llm a <<\nhi")
    first = chats.messages("trip", [Message("user", parts)], Place("c1", "m1"))
    chats.add("trip", first, shell.user_ns["a"], Place("c1", "m1"), None)
    again = chats.messages("trip", "And this?", Place("c2", "m2"))
    assert [m.content for m in again] == [parts, "Hello there.", "And this?"]
    assert "What is it? [1 picture]" in told(shell, "%llm chat trip")


def test_a_chat_beyond_the_models_window_says_how_to_begin_it_anew(shell, server) -> None:
    run(shell, "%%llm --chat trip\nhi")
    server.next(refused(400, "This model's maximum context length is 50 tokens. However, you requested 60 tokens."))
    error = run(shell, "%%llm --chat trip\nand then?").error
    assert isinstance(error, ContextTooLong)
    assert "%llm chat trip clear" in (error.next_step or "")
    assert questions(shell) == ["hi"]


def test_a_prompt_that_is_filled_in_is_remembered_as_it_was_sent(shell, server) -> None:
    shell.user_ns["city"] = "Lyon"
    run(shell, "%%llm --chat trip\nWhat of {{ city }}?")
    shell.user_ns["city"] = "Basel"
    run(shell, "%%llm --chat trip\nAnd?")
    assert sent(server)[0] == ("user", "What of Lyon?")
    assert LLMMagics.of(shell).chats.get("trip").turns[0].asked == (Message("user", "What of Lyon?"),)


def test_the_answer_to_a_schema_is_remembered_as_text(shell, server) -> None:
    server.next(said('{"name": "Ada"}'))
    run(shell, "%%llm --chat trip --schema name\nWho?")
    run(shell, "%%llm --chat trip\nAnd then?")
    assert ("assistant", '{"name": "Ada"}') in sent(server)


def test_planning_a_cell_adds_no_turn_and_counts_what_was_said(shell, server) -> None:
    run(shell, "%%llm --chat trip\n" + "a long question " * 50)
    alone = run(shell, "%%llm --plan\nAnd then?")
    planned = run(shell, "%%llm --plan --chat trip\nAnd then?")
    assert alone.error is planned.error is None
    assert questions(shell) == [("a long question " * 50).rstrip()]
    assert len(server.requests) == 1
    assert str(planned.outputs) != str(alone.outputs) or planned.stdout != alone.stdout


def test_repeat_and_chat_exclude_each_other(shell, server) -> None:
    assert "exclude each other" in str(run(shell, "%%llm --chat trip --repeat 2\nhi").error)
    assert server.requests == []


def test_a_picture_goes_along_in_later_turns(shell, server, folder) -> None:
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    (folder / "dot.png").write_bytes(base64.b64decode(dot))
    first = run(shell, "%%llm --chat trip --image dot.png\nWhat is it?")
    assert first.error is None
    run(shell, "%%llm --chat trip\nAnd its colour?")
    kinds = [part["type"] for part in server.requests[-1]["messages"][0]["content"]]
    assert sorted(kinds) == ["image_url", "text"]
    assert "[1 picture]" in told(shell, "%llm chat trip")
