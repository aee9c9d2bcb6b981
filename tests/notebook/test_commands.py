"""``%llm``: what is in force, and what was."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

import llmkit
from llmkit.errors import BudgetExceeded, ConfigError
from llmkit.notebook import budgets
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import refused
from tests.notebook.test_magics import run

CAPS = "caps for paid models: $0.50 a request, $5 a session, $20 a day (%llm budget off lifts them)"


def said(shell, line):
    shown = run(shell, line)
    assert shown.error is None, shown.error
    return shown.stdout


def mistake(shell, line):
    error = run(shell, line).error
    assert isinstance(error, ConfigError), error
    return str(error)


def test_status_is_one_block(shell, folder) -> None:
    run(shell, "%%llm\nhi")
    lines = dict(line.split(maxsplit=1) for line in said(shell, "%llm").splitlines())
    assert lines["model"] == "tiny (from llmkit.toml)"
    assert lines["request"] == "at most $0.50 (by default)"
    assert lines["budget"] == "day (by default): $0.000017 of $20 (0%)"
    assert lines["cache"].startswith("1 answer (")
    assert lines["cache"].endswith("); 0 hits and 1 miss in this session, saved $0")
    assert lines["spent"] == "$0.000017 in this session, 1 call"
    assert lines["circuits"] == "all closed"
    assert lines["settings"] == str(folder / "llmkit.toml")
    assert lines["ledger"].endswith("ledger.sqlite3")


def test_status_counts_only_this_kernels_calls(shell) -> None:
    run(shell, "%%llm\nhi")
    run(shell, "%reload_ext llmkit")
    assert "$0 in this session, 0 calls" in said(shell, "%llm status")


def test_models_lists_aliases_and_who_has_a_key(shell, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-neverShown0123456789")
    text = said(shell, "%llm models")
    assert "in use: tiny (from llmkit.toml)" in text
    assert "  tiny: vllm:tiny" in text
    assert "  openai: OPENAI_API_KEY is set" in text
    assert "  anthropic: ANTHROPIC_API_KEY\n" in text.partition("not set")[2]
    assert "neverShown" not in text


def test_use_changes_the_model_of_the_cells_that_follow(shell, server) -> None:
    assert said(shell, "%llm use deaf, tiny") == f"llmkit: model vllm:deaf → vllm:tiny · {CAPS}\n"
    assert "fell back from vllm:deaf" in said(shell, "%%llm\nhi")
    assert "deaf,tiny (chosen here)" in said(shell, "%llm")
    assert len(server.requests) == 1


def test_use_refuses_what_leads_nowhere(shell) -> None:
    assert "did you mean tiny?" in mistake(shell, "%llm use tiyn")
    assert "which model?" in mistake(shell, "%llm use")
    assert LLMMagics.of(shell).model == ""


def test_breakers_are_listed_isolated_and_reset(shell, server) -> None:
    assert "no endpoint has been used yet" in said(shell, "%llm breakers")
    server.next(refused(400))
    run(shell, "%%llm\nhi")
    assert said(shell, "%llm breakers") == "vllm:tiny: closed\n"
    assert said(shell, "%llm breakers isolate tiny") == "vllm:tiny: isolated\n"
    assert "isolated by hand" in str(run(shell, "%%llm\nhi").error)
    assert "vllm:tiny: isolated" in said(shell, "%llm")
    assert said(shell, "%llm breakers reset") == "vllm:tiny: closed\n"
    assert run(shell, "%%llm\nhi").error is None


@pytest.mark.parametrize("line", ["%llm breakers isolate", "%llm breakers open", "%llm breakers reset a b"])
def test_breakers_says_how_it_is_written(shell, line) -> None:
    assert "breakers" in mistake(shell, line)


def test_calls_is_a_frame(shell) -> None:
    run(shell, "%%llm\nhi")
    run(shell, "%%llm\nhi there")
    run(shell, "frame = get_ipython().run_line_magic('llm', 'calls 1')")
    frame = shell.user_ns["frame"]
    assert list(frame["status"]) == ["complete"]


def test_what_was_asked_for_whom_is_no_command_to_a_terminal(shell) -> None:
    evil = "ana\x1b[2J\x9b\u202e"
    with llmkit.Client() as client:
        client.complete("hi", user=evil, tags={evil: evil})
        kind = client.calls()["user"].dtype
    run(shell, "frame = get_ipython().run_line_magic('llm', 'calls')")
    frame = shell.user_ns["frame"]
    assert [*frame["user"], *frame["tags"]] == ["ana", {"ana": "ana"}]
    assert str(frame["user"].dtype) == str(kind)
    for by in ("user", "tag"):
        assert "ana" in (text := said(shell, f"%llm report {by}"))
        assert not re.search(r"[\x1b\x9b\u202e]", text)


@pytest.mark.parametrize("words", ["none", "0", "-1", "1 2", "99999999999"])
def test_calls_takes_a_number(shell, words) -> None:
    assert words.split()[0] in mistake(shell, f"%llm calls {words}")


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_every_limit_is_shown(shell) -> None:
    run(shell, "%%llm --user ana\nhi")
    text = said(shell, "%llm budget")
    assert text.splitlines() == [
        "a request:    at most $0.50 (by default)",
        "at a limit:   an error; there is a warning from 80% on",
        "time zone:    UTC",
        "",
        "scope                 limit      spent  held    left  used  resets",
        "session (by default)     $5  $0.000017    $0   $4.99    0%  with the kernel",
        f"day (by default)        $20  $0.000017    $0  $19.99    0%  {tomorrow()}",
        "",
        "what is set by default holds for paid models only; day=off lifts one, %llm budget off lifts all",
    ]


def tomorrow():
    return f"{datetime.now(UTC).date() + timedelta(days=1):%Y-%m-%d} 00:00"


def test_what_is_unknown_has_a_column_where_there_is_any(shell) -> None:
    session = shell.magics_manager.registry["LLMMagics"].session
    frame = session.portal.run(session.client.budgets())
    assert "unknown" not in budgets.table(frame, session.budget)
    frame["unknown"] = frame["unknown"].astype(float)
    frame.loc[0, "unknown"] = 0.5
    shown = budgets.table(frame, session.budget)
    assert re.search(r"held  unknown +left", shown)
    assert re.search(r"session .* \$0 +\$0\.5", shown)


def test_limits_are_set_for_this_session_and_kept_at_once(shell, server) -> None:
    line = "%llm budget user.ana.day=2usd tag.app=docs.day=0.00001usd month=100000tokens request=0.1usd session=off"
    text = said(shell, line)
    assert text.startswith(
        "set for this session; to keep it, write it to [budget] in llmkit.toml\n\na request:    at most $0.10\n"
    )
    scopes = [line.split("  ")[0] for line in text.splitlines()[6:-2]]
    assert scopes == ["scope", "day (by default)", "month", "user ana, day", "tag app=docs, day"]
    assert "100,000 tokens" in text
    error = run(shell, "%%llm --tag app=docs\nhi").error
    assert isinstance(error, BudgetExceeded)
    assert error.scope == "tag app=docs, day"
    assert server.requests == []
    assert run(shell, "%%llm --user ana\nhi").error is None
    brief = said(shell, "%llm")
    assert "\nbudget    user ana, day: $0.000017 of $2 (0%)\n" in brief
    assert "\nbudget    month: 12 tokens of 100,000 tokens (0%)\n" in brief


def test_one_limit_is_lifted_or_all_of_them(shell) -> None:
    assert "\nday" not in said(shell, "%llm budget day=off")
    text = said(shell, "%llm budget off")
    assert text == (
        "llmkit: all limits are lifted for this session: nothing caps what calls cost. %reload_ext llmkit restores them\n"
    )
    assert "a request:    no cap" in said(shell, "%llm budget")
    assert "no caps" in said(shell, "%llm use tiny")
    run(shell, "%reload_ext llmkit")
    assert "session (by default)" in said(shell, "%llm budget")


@pytest.mark.parametrize(
    "words, hint",
    [
        ("sesion=1usd", "did you mean session?"),
        ("user.ana.dya=1usd", "did you mean day?"),
        ("day", "NAME=AMOUNT"),
        ("day=much", "an amount is"),
        ("at_limit=wran", '"error" or "downgrade" or "warn"'),
        ("day=99999999usd", "from 0.000001 to 1000000"),
        ("tag.app.day=1usd", "a tag is key=value"),
        ("off day=1usd", "'off'"),
    ],
)
def test_wrong_limits_change_nothing(shell, words, hint) -> None:
    before = said(shell, "%llm budget")
    assert hint in mistake(shell, f"%llm budget {words}")
    assert said(shell, "%llm budget") == before


def test_a_limit_of_somebody_with_a_space_in_his_name(shell) -> None:
    assert "user ana b, day" in said(shell, "%llm budget 'user.ana b.day=1usd'")


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_the_cache_says_what_it_holds_and_saved(shell, server) -> None:
    run(shell, "%%llm\nhi")
    run(shell, "%%llm\nhi")
    assert len(server.requests) == 1
    lines = dict(line.split(maxsplit=1) for line in said(shell, "%llm cache").splitlines())
    assert lines["answers"].startswith("1 answer (")
    assert lines["answers"].endswith(" bytes); 1 hit and 1 miss in this session, saved $0.000017")
    assert lines["in"] == "all    saved $0.000017, by all calls in the ledger"
    assert lines["kept"].endswith("ledger.cache.sqlite3")


def test_the_cache_is_cleared(shell, server) -> None:
    run(shell, "%%llm\nhi")
    assert said(shell, "%llm cache clear").startswith("llmkit: 1 answer is removed from ")
    assert said(shell, "%llm cache clear").startswith("llmkit: 0 answers are removed from ")
    run(shell, "%%llm\nhi")
    assert len(server.requests) == 2


def test_the_cache_is_switched_off_and_on_again(shell, server) -> None:
    run(shell, "%%llm\nhi")
    assert "the cache is off" in said(shell, "%llm cache off")
    run(shell, "%%llm\nhi")
    assert "\ncache     off; 1 answer (" in said(shell, "%llm")
    assert said(shell, "%llm cache on") == "llmkit: the cache is on\n"
    run(shell, "%%llm\nhi")
    assert len(server.requests) == 2


@pytest.mark.parametrize("words", ["empty", "clear all", "on off"])
def test_the_cache_says_how_it_is_written(shell, words) -> None:
    assert words in mistake(shell, f"%llm cache {words}")


# -- reports -----------------------------------------------------------------------------------------------------------


def test_a_report_says_what_was_spent_and_saved(shell) -> None:
    run(shell, "%%llm --user ana --tag app=docs\nhi")
    run(shell, "%%llm --user ana --tag app=docs\nhi")
    head, _, names, row = said(shell, "%llm report user").splitlines()
    assert head == ("$0.000017 for 2 calls, by user, last 30d; $0.000017 saved by cached and shared answers")
    assert names.split()[:4] == ["user", "calls", "attempts", "input"]
    assert row.split() == ["ana", "2", "1", "7", "5", "$0.000017", "$0.000017"]
    assert f"\n{datetime.now(UTC):%Y-%m-%d}  " in said(shell, "%llm report")
    assert "\napp=docs  " in said(shell, "%llm report tag 1d")


def test_in_a_notebook_a_report_is_a_frame(shell, monkeypatch) -> None:
    run(shell, "%%llm --user ana\nhi")
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    run(shell, "frame = get_ipython().run_line_magic('llm', 'report user')")
    assert list(shell.user_ns["frame"]["user"]) == ["ana"]


def test_a_report_says_how_it_is_asked_for(shell) -> None:
    assert "did you mean month?" in mistake(shell, "%llm report mnth")
    assert "how far back" in str(run(shell, "%llm report day week").error.next_step)


def test_the_ledger_is_exported(shell, folder) -> None:
    run(shell, "%%llm\nhi")
    assert said(shell, "%llm export 'my calls.jsonl'") == "llmkit: 1 call with all attempts in my calls.jsonl\n"
    assert len((folder / "my calls.jsonl").read_text("utf-8").splitlines()) == 1
    assert "is there already" in mistake(shell, "%llm export 'my calls.jsonl'")
    assert "1 call" in said(shell, "%llm export 'my calls.jsonl' --overwrite")
    assert "export where to?" in mistake(shell, "%llm export")
    assert "export where to?" in mistake(shell, "%llm export a.csv b.csv")


def test_words_may_be_a_sentence(shell) -> None:
    assert "no command %llm What's" in mistake(shell, "%llm What's SSE")


def test_help_names_every_command(shell) -> None:
    text = said(shell, "%llm help")
    for name in ("models", "use", "budget", "cache", "report", "export", "breakers", "calls", "why"):
        assert f"%llm {name}" in text


@pytest.mark.parametrize("name", ["dashboard"])
def test_what_comes_later_says_so(shell, name) -> None:
    assert mistake(shell, f"%llm {name} x") == f"%llm {name} is not in this version yet"


def test_an_unknown_command_suggests_the_nearest(shell) -> None:
    assert "did you mean %llm models?" in mistake(shell, "%llm modles")
    assert "no command %llm Hello" in mistake(shell, "%llm Hello, what is SSE")
    assert "no topic 'modles'; did you mean %llm help models?" in mistake(shell, "%llm help modles")
