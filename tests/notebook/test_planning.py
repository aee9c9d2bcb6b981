"""``--plan``: the block of a cell, and that nothing happens for it."""

from __future__ import annotations

from decimal import Decimal

import pytest

from llmkit.errors import ConfigError, TemplateError
from llmkit.notebook.magics import LLMMagics
from llmkit.notebook.planning import as_html, budgets_after, totals
from llmkit.plan import Expectation, Plan, PlannedBudget, PlannedLink, Section
from tests.notebook.test_magics import run


def block(shell, code):
    """The text and the HTML that a cell showed."""
    shown = run(shell, code)
    assert shown.error is None, shown.error
    (output,) = shown.outputs
    return output.data["text/plain"], output.data["text/html"]


def calls(shell):
    return LLMMagics.of(shell).session.client.calls()


# -- one cell ------------------------------------------------------------------------------------------------------------


def test_a_plan_shows_all_of_it_and_sends_nothing(shell, server) -> None:
    text, page = block(shell, "%%llm --plan --max-tokens 100\nhello there")
    for name in ("plan", "tokens", "cost", "cache", "route", "budgets"):
        assert any(line.startswith(f"{name} ") for line in text.splitlines()), name
        assert f">{name}<" in page
    assert "vllm:tiny would be asked; nothing has been sent" in text
    assert "at most $0." in text
    assert server.requests == []
    assert calls(shell).empty


def test_the_plan_is_in_underscore_and_the_variable_keeps_what_was_paid_for(shell) -> None:
    run(shell, "%%llm answer <<\nhello")
    before = shell.user_ns["answer"]
    text, _ = block(shell, "%%llm answer << --plan\nanother")
    assert shell.user_ns["answer"] is before
    assert isinstance(shell.user_ns["_"], Plan)
    assert "answer is left as it is; _ holds the plan" in text


def test_quiet_shows_nothing_and_still_plans(shell) -> None:
    shown = run(shell, "%%llm --plan --quiet\nhello")
    assert (shown.outputs, shown.stdout) == ([], "")
    assert shell.user_ns["_"].source == "provider"


def test_what_each_expression_of_the_template_takes_is_told_the_dearest_first(shell) -> None:
    shell.user_ns.update(short="a", rows=[{"n": 1, "word": "two"}] * 40)
    text, page = block(shell, "%%llm --plan\nsay {{ short }} of {{ rows | json }}, {{ short }}")
    lines = [line for line in text.splitlines() if "{{" in line]
    assert "{{ rows | json }}" in lines[0]
    assert len(lines) == 3
    assert "tokens" in lines[0]
    assert "{{ rows | json }}" in page


def test_what_the_template_came_to_before_is_expected(shell) -> None:
    shell.user_ns["word"] = "one"
    run(shell, "%%llm\nsay {{ word }}")
    shell.user_ns["word"] = "two"
    text, _ = block(shell, "%%llm --plan\nsay {{ word }}")
    assert "output: as the one answer of this template" in text
    text, _ = block(shell, "%%llm --plan\nsay it: {{ word }}")
    assert "output: as the one answer of this model, which was not to this template" in text


def test_the_cache_is_asked_and_says_what_it_would_save(shell, server) -> None:
    run(shell, "%%llm\nhi")
    text, _ = block(shell, "%%llm --plan\nhi")
    assert "the cache answers; nothing would be sent" in text
    assert "answers, saves $0.000017" in text
    text, _ = block(shell, "%%llm --plan --cache refresh\nhi")
    assert "is not looked into; the answer is stored (refresh)" in text
    assert len(server.requests) == 1


def test_a_budget_that_would_refuse_is_named_and_the_cell_does_not_fail(shell, server) -> None:
    run(shell, "%llm budget day=0.000001usd")
    text, page = block(shell, "%%llm --plan\nhi")
    assert 'would be refused: the budget "day" does not allow it' in text
    assert next(line for line in text.splitlines() if line.endswith("refuses")).split()[:2] == ["day", "$0.000001"]
    assert "refuses" in page
    assert server.requests == []
    assert run(shell, "%%llm\nhi").error.scope == "day"


def test_save_saves_nothing_and_says_so(shell) -> None:
    text, _ = block(shell, "%%llm --plan --save greeting\nhello")
    assert "--save greeting: nothing is kept under --plan" in text
    assert "greeting" not in run(shell, "%llm prompts").stdout


def test_a_chats_history_is_in_the_tokens_and_no_turn_is_added(shell) -> None:
    alone = run(shell, "%%llm --plan --quiet\nand now?") and shell.user_ns["_"].input_tokens
    run(shell, "%%llm --chat trip\n" + "a long question " * 20)
    text, _ = block(shell, "%%llm --plan --chat trip\nand now?")
    plan = shell.user_ns["_"]
    assert plan.input_tokens > alone + 40
    assert "no turn is added" in text
    assert len(LLMMagics.of(shell).chats.get("trip").turns) == 1


def test_a_schema_counts(shell) -> None:
    run(shell, "%%llm --plan --quiet --max-tokens 50\nwho?")
    without = shell.user_ns["_"]
    run(shell, "%%llm --plan --quiet --max-tokens 50 --schema 'name, age int, tags list'\nwho?")
    plan = shell.user_ns["_"]
    assert plan.input_tokens > without.input_tokens
    assert plan.worst_usd > without.worst_usd
    assert plan.worst_in_all_usd > 2 * without.worst_in_all_usd  # an answer that does not fit is asked for again


def test_what_could_not_be_asked_is_an_error_under_plan_as_well(shell, server) -> None:
    assert isinstance(run(shell, "%%llm --plan\n{{ nobody }}").error, TemplateError)
    assert isinstance(run(shell, "%%llm --plan -m nobody:here\nhi").error, ConfigError)
    assert isinstance(run(shell, "%%llm --plan\n\n").error, ConfigError)
    assert server.requests == []


# -- several calls -------------------------------------------------------------------------------------------------------


def test_repeats_are_planned_one_after_the_other(shell, server) -> None:
    text, _ = block(shell, "%%llm --plan --repeat 3 --max-tokens 10\nhi")
    plans = shell.user_ns["_"]
    assert len(plans) == 3
    assert "3 calls: 3 would be asked, 0 answered by the cache; nothing has been sent" in text
    assert totals(plans).expected_usd == 3 * plans[0].expected_usd
    assert server.requests == []
    run(shell, "%%llm --repeat 2 --max-tokens 10\nhi")
    text, _ = block(shell, "%%llm --plan --repeat 3 --max-tokens 10\nhi")
    assert "3 calls: 1 would be asked, 2 answered by the cache" in text


def test_a_comparison_is_planned_for_all_its_calls(shell, server) -> None:
    text, _ = block(shell, "%%llm_compare --plan -m tiny,simulator -t 0,1\nhi")
    plans = shell.user_ns["_"]
    assert [plan.link.endpoint for plan in plans] == ["vllm:tiny", "vllm:tiny", *["simulator:simulator"] * 2]
    assert "4 calls: 4 would be asked" in text
    assert server.requests == []


def test_a_budget_that_lets_only_some_through_says_which(shell) -> None:
    run(shell, "%llm budget day=0.0005usd")
    text, _ = block(shell, "%%llm --plan --repeat 4 --max-tokens 100\nhi")
    plans = shell.user_ns["_"]
    refused = [plan.refused_by for plan in plans]
    assert refused[0] is None
    assert refused[-1] == "day"
    assert "would be refused; nothing has been sent" in text
    assert "would be refused: the budget" in text
    (day,) = [each for each in budgets_after(plans) if each.scope == "day"]
    goes = [plan for plan in plans if plan.refusal is None]
    assert day.refuses
    assert (day.spent, day.after_expected) == (0, sum(plan.expected_usd for plan in goes))
    assert day.after_worst == sum(plan.worst_usd for plan in goes)


def test_a_conversation_and_samples_exclude_each_other_under_plan_as_well(shell) -> None:
    assert isinstance(run(shell, "%%llm --plan --repeat 2 --chat trip\nhi").error, ConfigError)


# -- what is shown -------------------------------------------------------------------------------------------------------


def test_nothing_hostile_gets_into_the_page(shell) -> None:
    evil = "<img src=x onerror=alert(1)>[x](javascript:alert(1))$x$"
    shell.user_ns["evil"] = evil
    page = as_html([Section("plan", ((evil,),)), Section("route", ((evil, "\x1b[31m"),), (evil, "b"))])
    assert "<img" not in page
    assert "\x1b" not in page
    assert "<a" not in page
    assert "$" not in page
    text, shown = block(shell, "%%llm --plan --tag 'app=<b>'\nsay {{ '<script>' ~ evil }}")
    assert "<script>" not in shown
    assert "<script>" in text


def test_many_expressions_are_cut_to_the_dearest(shell) -> None:
    names = {f"v{n}": "word " * n for n in range(30)}
    shell.user_ns.update(names)
    prompt = " ".join(f"{{{{ {name} }}}}" for name in names)
    text, _ = block(shell, f"%%llm --plan\n{prompt}")
    assert "{{ v29 }}" in text
    assert "{{ v0 }}" not in text
    assert "10 more" in text


def test_an_unknown_price_makes_an_unknown_sum() -> None:
    def plan(usd, refusal=None):
        link = PlannedLink("a:b", "asked", None, 3, True, 5, Expectation(7, "default"), 9, usd, usd, 1)
        return Plan(model="m", source="provider" if refusal is None else None, links=(link,), refusal=refusal)

    one = Decimal("0.1")
    assert totals([plan(one), plan(one)]) == (2, 2, 0, 0, 6, 14, Decimal("0.2"), Decimal("0.2"))
    assert totals([plan(one), plan(None)])[6:] == (None, None)
    refused = plan(one, ConfigError("no"))
    assert totals([plan(one), refused]) == (2, 1, 0, 1, 3, 7, one, one)
    assert totals([plan(one), refused], with_refused=True)[4:7] == (6, 14, Decimal("0.2"))


def test_limits_of_unknown_cost_stay_unknown() -> None:
    row = PlannedBudget("day", "usd", Decimal(5), Decimal(1), Decimal(0), None, None, False, None)
    plan = Plan(model="m", source="provider", budgets=(row,))
    (after,) = budgets_after([plan, plan])
    assert (after.spent, after.after_expected, after.after_worst) == (1, None, None)


@pytest.mark.parametrize("mode", ["live", "final"])
def test_it_is_the_same_block_however_answers_are_shown(shell, monkeypatch, mode) -> None:
    monkeypatch.setenv("LLMKIT_DISPLAY", mode)
    text, _ = block(shell, "%%llm --plan --max-tokens 5\nhi")
    assert text.startswith("plan      vllm:tiny would be asked")
