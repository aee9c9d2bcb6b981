"""``%llm plan NOTEBOOK.ipynb``: every cell that asks, in its order, and nothing is sent or run."""

from __future__ import annotations

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmkit.errors import ConfigError
from llmkit.notebook.course import COLUMNS
from llmkit.notebook.magics import LLMMagics
from tests.notebook.test_magics import run

QUESTION = "%%llm --max-tokens 100\n"


class Planned:
    """What ``%llm plan`` showed of a notebook of these cells."""

    def __init__(self, shell, folder, *sources):
        cells = [new_code_cell(each) if isinstance(each, str) else each for each in sources]
        nbformat.write(new_notebook(cells=cells), folder / "n.ipynb")
        shown = run(shell, "%llm plan n.ipynb")
        assert shown.error is None, shown.error
        (output,) = shown.outputs
        self.text, self.page = output.data["text/plain"], output.data["text/html"]
        self.frame = shell.user_ns["_"]
        self.rows = self.frame.to_dict("records")

    def column(self, name):
        return [None if pd.isna(value) else value for value in self.frame[name]]


@pytest.fixture
def planned(shell, folder):
    return lambda *sources: Planned(shell, folder, *sources)


def spent(shell):
    return LLMMagics.of(shell).session.client.calls()


# -- rows ----------------------------------------------------------------------------------------------------------------


def test_each_cell_that_asks_is_a_row_and_nothing_is_sent_or_run(planned, shell, server) -> None:
    shown = planned(
        new_markdown_cell("# A notebook"),
        "x = 1 / 0\nran = True",
        f"{QUESTION}first",
        "%%time\n1",
        f"{QUESTION}second one",
    )
    assert list(shown.frame.columns) == list(COLUMNS)
    assert shown.column("cell") == [3, 5]
    assert shown.column("prompt") == ["first", "second one"]
    assert shown.column("model") == ["vllm:tiny"] * 2
    assert shown.column("output_tokens") == [50, 50]
    assert (shown.frame["worst_usd"] >= shown.frame["expected_usd"]).all()
    assert (shown.frame["expected_usd"] > 0).all()
    assert shown.text.startswith(
        "plan      2 cells of n.ipynb, 2 calls, 0 answered by the cache; nothing has been sent or run"
    )
    assert "second one" in shown.text
    assert server.requests == []
    assert spent(shell).empty
    assert "ran" not in shell.user_ns


def test_a_row_says_what_the_plan_of_its_cell_says(planned, shell) -> None:
    shown = planned(f"{QUESTION}first")
    run(shell, f"{QUESTION.strip()} --plan --quiet\nfirst")
    plan = shell.user_ns["_"]
    (row,) = shown.rows
    assert (row["input_tokens"], row["output_tokens"]) == (plan.input_tokens, plan.output_tokens)
    assert (row["expected_usd"], row["worst_usd"]) == (float(plan.expected_usd), float(plan.worst_usd))


def test_totals_are_those_of_the_rows(planned) -> None:
    shown = planned(f"{QUESTION}first", f"{QUESTION}second", "%%llm --repeat 3 --max-tokens 10\nthird")
    assert shown.column("calls") == [1, 1, 3]
    assert "5 calls" in shown.text
    assert f"{shown.frame['input_tokens'].sum():,} in" in shown.text


def test_the_same_question_again_is_the_caches(planned, shell) -> None:
    run(shell, f"{QUESTION}paid already")
    shown = planned(
        f"{QUESTION}a",
        f"{QUESTION}a",
        f"{QUESTION.strip()} --cache refresh\na",
        f"{QUESTION.strip()} --cache off\na",
        f"{QUESTION}paid already",
    )
    assert shown.column("cached") == [0, 1, 0, 0, 1]
    assert [cost > 0 for cost in shown.column("expected_usd")] == [True, False, True, True, False]


def test_what_the_ledger_knows_of_a_template_is_expected(planned, shell) -> None:
    shell.user_ns["word"] = "one"
    run(shell, "%%llm\nsay {{ word }}")  # five tokens, says the server
    shell.user_ns["word"] = "two"
    assert planned("%%llm\nsay {{ word }}").column("output_tokens") == [5]


def test_a_comparison_is_a_row_with_all_its_calls(planned, server) -> None:
    shown = planned("%%llm_compare -m tiny,simulator -t 0,1\nhi")
    assert (shown.column("calls"), shown.column("model")) == ([4], ["vllm:tiny, simulator:simulator"])
    assert server.requests == []


def test_cells_that_ask_nobody_are_no_rows(planned) -> None:
    assert planned("%%llm --plan\nhi", "%%llm --help\n", "print(1)").column("cell") == []


# -- budgets -------------------------------------------------------------------------------------------------------------


def test_a_budget_refuses_counting_the_cells_before(planned, shell) -> None:
    run(shell, "%llm budget day=0.0005usd")
    shown = planned(*[f"{QUESTION}question {number}" for number in range(5)])
    refused = shown.column("refused_by")
    assert refused[0] is None
    assert refused[-1] == "day"
    assert refused == sorted(refused, key=lambda scope: scope is not None), "once it is used up it stays so"
    assert f"{sum(scope is not None for scope in refused)} would be refused" in shown.text
    assert [line for line in shown.text.splitlines() if "day" in line and line.endswith("refuses")]


def test_what_only_the_worst_case_would_refuse_is_a_note(planned, shell) -> None:
    run(shell, "%llm budget day=0.0007usd")
    shown = planned(f"{QUESTION}one", f"{QUESTION}two")
    assert shown.column("refused_by") == [None, None]
    assert "cell 2: day would refuse it if the cells before came to their worst case" in shown.text


# -- lines ---------------------------------------------------------------------------------------------------------------


def test_lines_that_set_something_are_followed_where_they_stand(planned, shell) -> None:
    before = LLMMagics.of(shell).session.client.config.budget
    shown = planned(
        "%%llm\nfirst",
        "%config LLMMagics.max_tokens = 10",
        "%%llm\nsecond",
        "%llm use simulator",
        "%%llm\nthird",
        "%llm use tiny\n%llm budget day=0.000001usd",
        "%%llm\nfourth",
        "%llm budget day=off",
        "%%llm\nfifth",
    )
    assert shown.column("model") == ["vllm:tiny", "vllm:tiny", "simulator:simulator", "vllm:tiny", "vllm:tiny"]
    assert shown.column("output_tokens") == [500, 5, 5, 5, 5]
    assert shown.column("refused_by") == [None, None, None, "day", None]
    magics = LLMMagics.of(shell)
    assert magics.session.client.config.budget == before, "the limits of the kernel are what they were"
    assert (magics.model, magics.max_tokens) == ("", None)


def test_the_cache_may_be_turned_off_and_on(planned, shell) -> None:
    run(shell, f"{QUESTION}known")
    shown = planned("%llm cache off", f"{QUESTION}known", "%llm cache on", f"{QUESTION}known")
    assert shown.column("cached") == [0, 1]
    assert LLMMagics.of(shell).session.client.cache.enabled


def test_no_code_is_run_for_a_setting_and_that_is_said(planned, shell) -> None:
    shown = planned(
        "%config LLMMagics.user = (ran := 'x')\n%config LLMMagics.temperature = 9\n%llm use nobody:here\n%llm budget dya=1usd",
        f"{QUESTION}hi",
    )
    assert "only a value that stands there is followed; no code is run" in shown.text
    assert "temperature is a number from 0 to 2" in shown.text
    assert "nobody" in shown.text
    assert "did you mean day?" in shown.text
    assert "ran" not in shell.user_ns
    assert shown.column("error") == [None]


def test_reloading_restores_the_limits(planned, shell) -> None:
    shown = planned("%llm budget day=0.000001usd", f"{QUESTION}a", "%reload_ext llmkit", f"{QUESTION}b")
    assert shown.column("refused_by") == ["day", None]


# -- what is not there ---------------------------------------------------------------------------------------------------


def test_names_that_are_not_defined_are_named_and_the_rest_is_counted(planned, shell) -> None:
    shell.user_ns["known"] = "word " * 100
    shown = planned(
        "%%llm --max-tokens 10\n{{ known }} and {{ unknown }} {% for x in rows %}{{ x }}{% endfor %}",
        "%%llm --max-tokens 10\n{{ other }}",
        "%%llm --max-tokens 10\n{{ known }}",
    )
    assert shown.column("missing") == ["rows, unknown", "other", None]
    assert shown.column("error") == [None] * 3
    least, nothing, whole = shown.column("input_tokens")
    assert nothing < 20 < whole
    assert abs(least - whole) < 10
    assert "≥" in shown.text
    assert "cell 1: not defined in this kernel: rows, unknown; its tokens and cost are counted without" in shown.text
    assert "at least" in shown.text


def test_a_missing_name_in_the_system_prompt_is_named(planned) -> None:
    shown = planned("%%llm -s 'be {{ how }}' --max-tokens 10\nhi")
    assert (shown.column("missing"), shown.column("error")) == (["how"], [None])


def test_a_wrong_cell_is_said_and_the_others_go_on(planned) -> None:
    shown = planned(
        "%%llm --nonsense\nhi",
        "%%llm -m nobody:here\nhi",
        "%%llm\n{{ 1 // 0 }}",
        "%%llm\n",
        "%%llm -t hot\nhi",
        "%%llm_map frame\nhi",
        f"{QUESTION}good",
    )
    errors = shown.column("error")
    assert [error is not None for error in errors] == [True] * 6 + [False]
    assert "there is no option --nonsense" in errors[0]
    assert "ZeroDivisionError" in errors[2]
    assert "the prompt is empty" in errors[3]
    assert "%%llm_map is not planned in this version" in errors[5]
    assert "cell 1 cannot be planned" in shown.text
    assert shown.column("input_tokens")[:6] == [None] * 6


# -- conversations -------------------------------------------------------------------------------------------------------


def test_a_conversation_grows_with_what_is_expected_to_be_answered(planned, shell) -> None:
    cells = [f"%%llm --chat trip --max-tokens 200\nquestion {number}" for number in range(3)]
    shown = planned(*cells, "%%llm --chat other --max-tokens 200\nquestion 9")
    first, second, third, other = shown.column("input_tokens")
    assert second > first + 80
    assert third > second + 80
    assert other == first
    assert LLMMagics.of(shell).chats.names == []


def test_what_was_said_in_this_kernel_is_the_beginning(planned, shell) -> None:
    alone = planned("%%llm --chat trip --max-tokens 5\nhi").column("input_tokens")[0]
    run(shell, "%%llm --chat trip\n" + "long " * 100)
    assert planned("%%llm --chat trip --max-tokens 5\nhi").column("input_tokens")[0] > alone + 50


# -- how it is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["%llm plan", "%llm plan a.ipynb b.ipynb", "%llm plan nothing.ipynb"])
def test_no_name_or_a_wrong_one_is_one_clear_error(shell, line) -> None:
    error = run(shell, line).error
    assert isinstance(error, ConfigError)
    assert error.next_step


def test_a_path_may_have_blanks(shell, folder) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell("%%llm\nhi")]), folder / "my notebook.ipynb")
    assert run(shell, "%llm plan 'my notebook.ipynb'").error is None


def test_in_a_page_the_rows_are_the_cells_value(shell, folder, monkeypatch) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell("%%llm\nhi")]), folder / "n.ipynb")
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    shown = run(shell, "frame = %llm plan n.ipynb")
    assert shown.error is None
    assert shell.user_ns["frame"]["cell"].tolist() == [1]
    assert "\ncells" not in shown.outputs[0].data["text/plain"], "the rows are shown once"


def test_nothing_of_a_notebook_gets_into_the_page_unescaped(planned) -> None:
    evil = "<script>alert(1)</script>\x1b[31m"
    shown = planned(f"{QUESTION}{evil}", f"%llm use {evil}", "%%llm\n{{ missing }} <b>")
    assert "<script>" not in shown.page
    assert "\x1b" not in shown.page + shown.text


def test_a_notebook_of_too_many_calls_says_so(planned, monkeypatch) -> None:
    monkeypatch.setattr("llmkit.notebook.course.MOST_CALLS", 2)
    shown = planned(*[f"{QUESTION}{number}" for number in range(3)])
    assert "more than 2 calls" in shown.column("error")[2]
