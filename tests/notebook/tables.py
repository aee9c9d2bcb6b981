"""The tables of ``docs/notebook.md``, made from what reads the lines of cells and commands.

``python -m tests.notebook.tables`` writes them anew, between the marks where they stand.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.notebook import manual
from llmkit.notebook.commands import commands
from llmkit.notebook.magics import LLMMagics

PAGE = Path(__file__).parent.parent.parent / "docs" / "notebook.md"


def code(text):
    """``text`` as code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def words(text):
    """A sentence in a cell of a table, in which braces, options and names of settings are code."""
    text = re.sub(r"(\{\{|\{%)", r"`\1`", text)
    return text.replace("|", "\\|")


def options(magic):
    rows = ["| option | | example |", "|---|---|---|"]
    if magic in manual.MAGICS:
        held, name = ("DataFrame", "grid") if magic == "llm_compare" else ("reply", "answer")
        rows.append(f"| `NAME <<` | variable for the {held} | {code(f'%%{magic} {name} << …')} |")
    for option in manual.options(magic):
        rows.append(f"| {code(option.form)} | {words(option.what)} | {', '.join(map(code, option.examples))} |")
    return rows


def all_commands():
    rows = ["| | |", "|---|---|"]
    for command in commands().values():
        for form, what in command.forms:
            if form:
                rows.append(f"| {code(form)} | {words(what)} |")
            else:
                rows[-1] = f"{rows[-1].removesuffix(' |')} {words(what)} |"
    return rows


def settings():
    rows = ["| | |", "|---|---|"]
    for name, trait in LLMMagics.class_own_traits(config=True).items():
        rows.append(f"| {code(name)} | {words(trait.help)} |")
    return rows


TABLES = {
    "the options of %%llm": lambda: options("llm"),
    "the options of %%llm_compare": lambda: options("llm_compare"),
    "the commands of %llm": all_commands,
    "the settings of LLMMagics": settings,
}


def made(page):
    """The page with its tables as they should be.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: python -m tests.notebook.tables -->", "<!-- end of the table -->"
        before, mark, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not mark or not closed:
            raise ValueError(f"{PAGE.name} has no place for {name}: {begin} … {end}")
        page = "".join([before, mark, "\n", "\n".join(table()), "\n", closed, after])
    return page


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text("utf-8")), "utf-8")
