"""Help: everything that can be said is in it, with examples that are valid, and the page says the same."""

from __future__ import annotations

import inspect
import shlex

import pytest

from llmkit.errors import ConfigError
from llmkit.notebook import arguments, forms, manual
from llmkit.notebook.commands import commands
from llmkit.notebook.magics import LLMMagics
from llmkit.settings import SETTINGS
from tests.notebook import tables
from tests.notebook.test_commands import mistake, said
from tests.notebook.test_magics import run

OPTIONS = [(magic, option) for magic in manual.MAGICS for option in manual.options(magic)]
COMMANDS = sorted(commands())


def line_of(magic, example):
    """The line of a cell in an example: what stands behind the magic, if that is named."""
    return example.removeprefix(f"%%{magic}").strip()


def check(line):
    """A line of help is one that could be run.

    Raises:
        ConfigError: it could not.
    """
    magic, *words = shlex.split(line)
    if magic in {"%%llm", "%%llm_compare"}:
        read = arguments.parse if magic == "%%llm" else arguments.parse_grid
        read(line_of(magic.removeprefix("%%"), line))
        return
    command = commands()[words[0] if words else "status"]
    assert any(forms.fits(form, words[1:]) for form, _ in command.forms if form), line


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic, option", OPTIONS, ids=lambda each: each if isinstance(each, str) else each.form)
def test_every_option_has_a_sentence_and_a_valid_example(magic, option) -> None:
    assert option.what
    assert option.examples
    name = option.form.split(",")[0].split()[0]
    for example in option.examples:
        assert any(each.strip().split()[0] in example.split() for each in option.form.split(",")), name
        check(f"%%{magic} {line_of(magic, example)}")


def test_help_of_the_magics_is_what_their_question_mark_shows(shell) -> None:
    for magic, function in (("llm", LLMMagics.ask), ("llm_compare", LLMMagics.compare)):
        shown = said(shell, f"%%{magic} --help\nhi")
        assert shown.strip() == (function.__doc__ or "").strip()
        assert shown.strip() == manual.text_of(f"%%{magic}").strip()
        for option in manual.options(magic):
            assert option.form.split(",")[0].split()[0] in shown
        for action in arguments.parser_of(magic)._actions:
            assert all(name in shown for name in action.option_strings)
    assert "e.g. --max-cost 0.01" in inspect.getdoc(LLMMagics.ask)
    assert "%%llm answer << -m gpt-5-mini" in inspect.getdoc(LLMMagics.ask)


@pytest.mark.parametrize("topic", ["", "%%llm", "%%llm_compare", *sorted(manual.TEXTS)])
def test_help_fits_a_cell_and_has_no_marks_of_another_format(topic) -> None:
    text = manual.text_of(topic) if topic else manual.help_text()
    assert max(map(len, text.split("\n"))) <= manual.COLUMN + manual.WIDTH
    assert not [mark for mark in ("::", "%%%", "<K=V>", "{use,") if mark in text]


def test_help_asks_nothing(shell, server) -> None:
    run(shell, "%%llm --help\nhi")
    run(shell, "%%llm -h\nhi")
    assert server.requests == []


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_forms_and_valid_examples(name) -> None:
    command = commands()[name]
    written = [form for form, what in command.forms if form and what]
    assert written
    assert all(form == "%llm" or form.split()[1] == name for form in written)
    examples = manual.examples(command.more)
    assert any(each.split()[:2] == f"%llm {name if name != 'status' else ''}".split() for each in examples), (
        command.more
    )
    for each in examples:
        check(each)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_help(shell, name) -> None:
    text = said(shell, "%llm help")
    assert all(form in text for form, _ in commands()[name].forms)
    of_it = said(shell, f"%llm help {name}")
    assert commands()[name].forms[0][0] in of_it
    assert commands()[name].more in of_it


def test_examples_are_read_out_of_a_text() -> None:
    text = "words\n%llm a b      what it does\n%%llm -m x\n  %llm not one\n%llm"
    assert manual.examples(text) == ["%llm a b", "%%llm -m x", "%llm"]


# -- topics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", sorted(manual.topics()))
def test_every_topic_has_a_text(shell, topic) -> None:
    assert len(said(shell, f"%llm help {topic}")) > 20


@pytest.mark.parametrize("topic", sorted(manual.TEXTS))
def test_examples_in_the_texts_are_valid(topic) -> None:
    for each in manual.examples(manual.TEXTS[topic]):
        check(each)


def test_an_option_is_explained_with_its_example(shell) -> None:
    for topic in ("--max-cost", "max-cost"):
        text = said(shell, f"%llm help {topic}")
        assert "--max-cost USD" in text
        assert "%%llm --max-cost 0.01" in text
    assert "-t, --temperature" in said(shell, "%llm help -t")
    assert "%%llm_compare" in said(shell, "%llm help -t")  # where it means several


def test_an_unknown_topic_suggests_the_nearest(shell) -> None:
    assert "did you mean %llm help --schema?" in mistake(shell, "%llm help schemas")
    assert "did you mean %llm help templates?" in mistake(shell, "%llm help template")
    assert "no place here" in mistake(shell, "%llm help a b")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_says_the_same() -> None:
    page = tables.PAGE.read_text("utf-8")
    assert page == tables.made(page), "python -m tests.notebook.tables writes the tables anew"


def test_a_page_without_a_place_for_a_table_is_seen() -> None:
    with pytest.raises(ValueError, match="no place"):
        tables.made("a page")


def test_tables_hold_every_option_command_and_setting() -> None:
    page = tables.PAGE.read_text("utf-8")
    for magic in manual.MAGICS:
        for action in arguments.parser_of(magic)._actions:
            assert any(f"`{name}" in page or f", {name}" in page for name in action.option_strings)
    for name in LLMMagics.class_own_traits(config=True):
        assert f"| `{name}` |" in page


# -- settings ----------------------------------------------------------------------------------------------------------


def test_every_setting_of_cells_is_listed_with_help(shell) -> None:
    listed = said(shell, "%config LLMMagics")
    traits = LLMMagics.class_own_traits(config=True)
    assert len(traits) > 10
    for name, trait in traits.items():
        assert f"LLMMagics.{name}=" in listed
        assert len(trait.help) > 10, name
        assert trait.help.split()[0] in listed


def test_choices_in_the_file_are_those_of_the_cell() -> None:
    assert SETTINGS["notebook"]["format"].choices == arguments.FORMATS


def test_settings_come_from_the_file_then_the_variables_then_config_then_the_cell(
    bare, folder, server, monkeypatch
) -> None:
    (folder / "llmkit.toml").write_text(
        server.settings() + "[notebook]\nsystem = 'From the file.'\nmax_tokens = 7\ntemperature = 0.1\n", "utf-8"
    )
    monkeypatch.setenv("LLMKIT_NOTEBOOK_TEMPERATURE", "0.2")
    monkeypatch.setenv("LLMKIT_NOTEBOOK_USER", "ana")
    run(bare, "%load_ext llmkit")
    run(bare, "%config LLMMagics.max_tokens = 8")
    run(bare, "%%llm -s 'From the cell.'\nhi")
    run(bare, "%%llm\nhi")
    first, second = server.requests
    assert first["messages"][0]["content"] == "From the cell."
    assert second["messages"][0]["content"] == "From the file."
    assert second["temperature"] == 0.2
    assert 8 in second.values()
    assert LLMMagics.of(bare).session.client.ledger.calls(limit=1)[0]["user"] == "ana"


def test_the_file_says_how_answers_and_errors_are_shown(bare, folder, server, monkeypatch) -> None:
    monkeypatch.delenv("LLMKIT_DISPLAY", raising=False)
    (folder / "llmkit.toml").write_text(
        server.settings() + "[notebook]\nformat = 'code'\ndisplay = 'final'\ntraceback = true\n", "utf-8"
    )
    run(bare, "%load_ext llmkit")
    (shown, *_) = run(bare, "%%llm\nhi").outputs
    assert shown.data["text/markdown"].startswith("```")
    run(bare, "%config LLMMagics.format = 'text'")
    (shown, *_) = run(bare, "%%llm\nhi").outputs
    assert "text/markdown" not in shown.data
    assert LLMMagics.of(bare).shows_traceback
    run(bare, "%config LLMMagics.traceback = False")
    assert not LLMMagics.of(bare).shows_traceback


def test_a_wrong_setting_of_cells_is_one_clear_error(bare, folder, server) -> None:
    (folder / "llmkit.toml").write_text(server.settings() + "[notebook]\nformat = 'pdf'\n", "utf-8")
    run(bare, "%load_ext llmkit")
    error = run(bare, "%%llm\nhi").error
    assert isinstance(error, ConfigError)
    assert "notebook.format" in str(error)
