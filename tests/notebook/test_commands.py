"""``%llm``: what is in force, and what was."""

from __future__ import annotations

import pytest

from llmkit.errors import ConfigError
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import refused
from tests.notebook.test_magics import run


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
    assert lines["caps"] == "$0.50 a request"
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
    assert said(shell, "%llm use deaf, tiny") == "llmkit: model vllm:deaf → vllm:tiny · cap $0.50 a request\n"
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
    run(shell, "%%llm\nhi")
    run(shell, "frame = get_ipython().run_line_magic('llm', 'calls 1')")
    frame = shell.user_ns["frame"]
    assert list(frame["status"]) == ["complete"]


@pytest.mark.parametrize("words", ["none", "0", "-1", "1 2", "99999999999"])
def test_calls_takes_a_number(shell, words) -> None:
    assert words.split()[0] in mistake(shell, f"%llm calls {words}")


def test_why_tells_the_life_of_a_call(shell, server) -> None:
    server.next(refused(503, "busy", retry_after="0.1"))
    run(shell, "%%llm a << --user ana --tag app=docs\nhi")
    told = said(shell, "%llm why")
    assert "asked for tiny by ana, app=docs" in told
    assert "attempt 1: vllm:tiny failed" in told
    assert "ProviderOverloaded: vllm:tiny answered 503: busy" in told
    assert "attempt 2: vllm:tiny complete" in told
    request_id = shell.user_ns["a"].request_id
    run(shell, "%%llm\nhi")
    assert said(shell, f"%llm why {request_id[:12]}") == told


def test_why_knows_when_there_is_nothing_to_tell(shell) -> None:
    assert "no such call" in mistake(shell, "%llm why ffffffffffff")


def test_help_names_every_command(shell) -> None:
    text = said(shell, "%llm help")
    for name in ("models", "use", "breakers", "calls", "why"):
        assert f"%llm {name}" in text


@pytest.mark.parametrize(
    "name", ["budget", "cache", "show", "report", "dashboard", "record", "replay", "live", "doctor"]
)
def test_what_comes_later_says_so(shell, name) -> None:
    assert mistake(shell, f"%llm {name} x") == f"%llm {name} is not in this version yet"


def test_an_unknown_command_suggests_the_nearest(shell) -> None:
    assert "did you mean %llm models?" in mistake(shell, "%llm modles")
    assert "no command %llm Hello" in mistake(shell, "%llm Hello, what is SSE")
    assert "'x' has no place here" in mistake(shell, "%llm help x")
