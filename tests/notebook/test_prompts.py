"""``--save``, ``--with`` and ``%llm prompts``."""

from __future__ import annotations

import pytest

from llmkit.errors import ConfigError, StoreError, TemplateError
from llmkit.notebook.magics import LLMMagics
from tests.notebook.server import refused
from tests.notebook.test_magics import run


def kept(shell):
    return [(each.reference, each.text, each.system) for each in LLMMagics.of(shell).session.prompts]


def asked(server):
    return [message["content"] for message in server.requests[-1]["messages"]]


def test_a_prompt_is_kept_as_it_stood_and_asked_filled_in(shell, server) -> None:
    shell.user_ns["x"] = "the report"
    shown = run(shell, "%%llm --save sum -s 'For {{ x }}'\nSum up {{ x }}.")
    assert shown.stdout.startswith("llmkit: kept as sum@1\n")
    assert asked(server) == ["For the report", "Sum up the report."]
    assert kept(shell) == [("sum@1", "Sum up {{ x }}.", "For {{ x }}")]


def test_run_again_it_is_the_same_version(shell) -> None:
    for text in ("one", "two", "one"):
        shown = run(shell, f"%%llm --save sum\n{text}")
    assert shown.stdout.startswith("llmkit: kept as sum@1\n")
    assert [reference for reference, _, _ in kept(shell)] == ["sum@1", "sum@2"]


def test_a_kept_prompt_begins_the_cell(shell, server) -> None:
    shell.user_ns["x"] = "A"
    run(shell, "%%llm --save sum -s Terse\nSum up {{ x }}.")
    shell.user_ns["x"] = "B"
    run(shell, "%%llm --with sum")
    assert asked(server) == ["Terse", "Sum up B."]
    run(shell, "%%llm --with sum@1 -s Long\nAnd {{ x }} again.")
    assert asked(server) == ["Long", "Sum up B.\n\nAnd B again."]


def test_the_newest_is_meant_and_an_older_one_can_be_named(shell, server) -> None:
    run(shell, "%%llm --save sum\none")
    run(shell, "%%llm --save sum\ntwo")
    run(shell, "%%llm --with sum")
    assert asked(server) == ["two"]
    run(shell, "%%llm --with sum@1 --cache off")
    assert asked(server) == ["one"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%llm --with sumary", "no prompt is kept as sumary; did you mean summary?"),
        ("%%llm --with summary@7\nhi", "no version 7 of the prompt summary: there is 1"),
        ("%%llm --with summary@x", "names no version"),
        ("%%llm --save 'a b'\nhi", "cannot be the name of a prompt"),
        ("%%llm --save summary --tag prompt=mine\nhi", "the tag prompt says which kept prompt was asked"),
        ("%%llm --with summary --tag prompt=mine\nhi", "the tag prompt says which kept prompt was asked"),
        ("%%llm --save summary", "the prompt is empty"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_sent_or_kept(shell, server, cell, message) -> None:
    run(shell, "%%llm --save summary\nfirst")
    before = len(server.requests)
    error = run(shell, cell).error
    assert isinstance(error, ConfigError)
    assert message in error.message
    assert len(server.requests) == before
    assert kept(shell) == [("summary@1", "first", None)]


def test_a_name_that_is_missing_in_a_kept_prompt_says_where(shell, server) -> None:
    shell.user_ns["x"] = 1
    run(shell, "%%llm --save sum\nSum up {{ x }}.")
    del shell.user_ns["x"]
    before = len(server.requests)
    error = run(shell, "%%llm --with sum\nNow.").error
    assert isinstance(error, TemplateError)
    assert error.name == "x"
    assert error.message.startswith("in the kept prompt sum@1: ")
    assert len(server.requests) == before


def test_it_is_kept_although_the_call_fails(shell, server) -> None:
    server.next(refused(400))
    assert run(shell, "%%llm --save sum\nhi").error is not None
    assert kept(shell) == [("sum@1", "hi", None)]


def test_where_it_cannot_be_kept_nothing_is_sent(shell, server, monkeypatch) -> None:
    prompts = LLMMagics.of(shell).session.client.prompts

    def full(*_, **__):
        raise StoreError("the disk is full")

    monkeypatch.setattr(type(prompts._store), "save", full)
    assert isinstance(run(shell, "%%llm --save sum\nhi").error, StoreError)
    assert server.requests == []


def test_a_plan_keeps_nothing(shell, server) -> None:
    assert run(shell, "%%llm --save sum --plan\nhi").error is None
    assert (kept(shell), server.requests) == ([], [])


def test_what_is_raw_stays_raw(shell, server) -> None:
    run(shell, "%%llm --save jinja --raw\nExplain {{ nowhere }}.")
    shell.user_ns["x"] = 1
    run(shell, "%%llm --with jinja\nIn {{ x }} line.")
    assert asked(server) == ["Explain {{ nowhere }}.\n\nIn 1 line."]
    error = run(shell, "%%llm --with jinja --save both\nIn {{ x }} line.").error
    assert isinstance(error, ConfigError)
    assert "jinja@1 is no template" in error.message


def test_a_prompt_that_begins_with_another_is_kept_whole(shell) -> None:
    run(shell, "%%llm --save one -s Terse\nOne.")
    run(shell, "%%llm --with one --save two\nTwo.")
    assert kept(shell)[1] == ("two@1", "One.\n\nTwo.", "Terse")


def test_versions_are_told_apart_in_the_ledger(shell) -> None:
    run(shell, "%%llm --save sum --tag app=docs\none")
    run(shell, "%%llm --with sum --cache off")
    tags = LLMMagics.of(shell).session.client.calls()["tags"].tolist()
    assert tags == [{"app": "docs", "prompt": "sum@1"}, {"prompt": "sum@1"}]


def test_they_belong_to_the_folder_of_the_settings(shell, folder, tmp_path_factory, monkeypatch) -> None:
    run(shell, "%%llm --save sum\none")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(kept(shell)) == 1
    assert LLMMagics.of(shell).session.prompts.project == folder


# -- %llm prompts ------------------------------------------------------------------------------------------------------


def test_the_list_says_names_versions_and_first_words(shell, folder) -> None:
    assert run(shell, "%llm prompts").stdout.startswith(f"no prompt is kept in {folder} yet")
    run(shell, "%%llm --save sum\nSum up\n  this text.")
    run(shell, "%%llm --save sum\nSum \x1b[31mup " + "that " * 50)
    lines = run(shell, "%llm prompts").stdout.split("\n")
    assert lines[0].split() == ["name", "versions", "saved", "begins", "with"]
    assert lines[1].startswith("sum@2  2  ")
    assert "Sum up that that" in lines[1]
    assert len(lines[1]) < 110
    assert lines[3] == f"project {folder}"


def test_a_name_shows_its_versions_and_the_last_change(shell) -> None:
    run(shell, "%%llm --save sum\none\ntwo")
    assert run(shell, "%llm prompts sum").stdout.endswith("sum@1\n\none\ntwo\n")
    run(shell, "%%llm --save sum -s Terse\none\nthree")
    shown = run(shell, "%llm prompts sum").stdout
    assert shown.endswith("+ system: Terse\n--- sum@1\n+++ sum@2\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n")
    run(shell, "%%llm --save sum\nfour")
    assert "-one\n-two\n+four" in run(shell, "%llm prompts sum@1 sum@3").stdout
    assert run(shell, "%llm prompts sum@1 sum@1").stdout == "sum@1 and sum@1 say the same\n"
    assert run(shell, "%llm prompts sum@2").stdout == "sum@2\n\nsystem: Terse\n\none\nthree\n"


def test_versions_and_names_are_removed(shell) -> None:
    for text in ("one", "two", "three"):
        run(shell, f"%%llm --save sum\n{text}")
    assert run(shell, "%llm prompts sum@2 remove").stdout == "llmkit: sum@2 is removed\n"
    assert run(shell, "%llm prompts sum remove").stdout == "llmkit: sum is removed, 2 versions\n"
    assert kept(shell) == []


@pytest.mark.parametrize("words", ["nothing", "a@1 b@2", "sum@1 sum@2 sum@3", "nothing remove"])
def test_what_it_cannot_show_is_an_error(shell, words) -> None:
    run(shell, "%%llm --save sum\none")
    error = run(shell, f"%llm prompts {words}").error
    assert isinstance(error, ConfigError)
    assert error.next_step
