"""In a real kernel: what Tab is answered, which cell a chat's turn belongs to, and an answer that is shown again."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from tests.notebook.server import said
from tests.notebook.test_kernel import WAIT_S, kernel, plain, running  # noqa: F401


def tab(kernel, cell):  # noqa: F811
    """The cell as each offer would make it; the cursor stands at the mark."""
    before, _, after = cell.partition("¦")
    asked = kernel.client.complete(before + after, len(before))
    while True:
        reply = kernel.client.get_shell_msg(timeout=WAIT_S)
        if reply["parent_header"].get("msg_id") == asked:
            break
    content = reply["content"]
    return [before[: content["cursor_start"]] + match for match in content["matches"]]


def test_tab_is_answered_by_the_kernel(kernel) -> None:  # noqa: F811
    assert tab(kernel, "%%llm --max-c¦\nhi") == ["%%llm --max-cost"]
    assert tab(kernel, "%%llm -m tiny,deaf¦\nhi") == ["%%llm -m tiny,deaf", "%%llm -m tiny,deaf2"]
    assert tab(kernel, "%llm bre¦") == ["%llm breakers"]
    assert kernel.run("my_table = [1, 2]") == "ok"
    assert tab(kernel, "%%llm\nWhat is in {{ my_t¦ }}?") == ["%%llm\nWhat is in {{ my_table"]
    assert "import json" in tab(kernel, "import jso¦")


@pytest.mark.parametrize("jedi", [True, False])
def test_with_and_without_jedi(kernel, jedi) -> None:  # noqa: F811
    assert kernel.run(f"%config IPCompleter.use_jedi = {jedi}") == "ok"
    assert tab(kernel, "%%llm --cache re¦\nhi") == ["%%llm --cache refresh"]
    assert kernel.run("%config IPCompleter.use_jedi = True") == "ok"


def run_cell(kernel, cell, code):  # noqa: F811
    """As JupyterLab, Notebook 7 and VS Code do, which say which cell it is."""
    session = kernel.client.session
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = session.msg("execute_request", content | {"stop_on_error": True}, metadata={"cellId": cell})
    kernel.client.shell_channel.send(message)
    kernel.id, kernel.messages = message["header"]["msg_id"], []
    return kernel.rest()


def test_a_turn_belongs_to_its_cell(kernel, server) -> None:  # noqa: F811
    for _ in range(2):
        for number in "123":
            assert run_cell(kernel, f"cell-{number}", f"%%llm --chat trip\nquestion {number}") == "ok"
    assert len(server.requests) == 3
    server.next(said("Otherwise."))
    assert run_cell(kernel, "cell-1", "%%llm --chat trip\nanother question") == "ok"
    assert "the chat trip goes on from turn 1; 2 later turns are left out" in plain(kernel.outputs()[1])
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "another question"}]
    assert run_cell(kernel, "cell-2", "%%llm --chat trip\nquestion 2") == "ok"
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["another question", "Otherwise.", "question 2"]


def test_an_answer_is_shown_again_in_another_kernel(kernel, server) -> None:  # noqa: F811
    server.next(said("*Whole*, for $5 or $6."))
    assert kernel.run("%%llm a <<\nhi") == "ok"
    answer, footer = kernel.outputs()
    assert kernel.run("%reload_ext llmkit\n%llm show") == "ok"
    again = [output for output in kernel.outputs() if output["kind"] == "display_data"]
    assert [each["data"] for each in again] == [answer["data"], footer["data"]]
    assert again[0]["metadata"] == answer["metadata"]


def test_without_a_frontend_turns_are_appended(kernel, server) -> None:  # noqa: F811
    """nbclient says nothing of cells."""
    cells = ["%load_ext llmkit", *(f"%%llm --chat trip\nquestion {number}" for number in "112")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(kernel.folder)}}).execute()
    assert [m["content"] for m in server.requests[-1]["messages"]] == [
        "question 1",
        "Hello there.",
        "question 1",
        "Hello there.",
        "question 2",
    ]


@pytest.mark.parametrize("magic, option", [("%%llm", "--max-cost USD"), ("%%llm_compare", "--temperature")])
def test_a_question_mark_shows_every_option(kernel, server, magic, option) -> None:  # noqa: F811
    asked = kernel.client.execute(f"{magic}?")
    while True:
        reply = kernel.client.get_shell_msg(timeout=WAIT_S)
        if reply["parent_header"].get("msg_id") == asked:
            break
    (page,) = reply["content"]["payload"]
    assert option in page["data"]["text/plain"]
    assert kernel.run(f"{magic} --help") == "ok"
    assert option in kernel.outputs()[0]["text"]
    assert server.requests == []
