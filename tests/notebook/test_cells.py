"""llmkit.notebook.cells: what of a file is read, and what is refused."""

from __future__ import annotations

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmkit.errors import ConfigError
from llmkit.notebook import cells
from llmkit.notebook.cells import Cell, Line, read


def written(tmp_path, *sources):
    path = tmp_path / "n.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return str(path)


def test_cells_that_ask_and_lines_that_set_are_found_in_their_order(tmp_path) -> None:
    path = tmp_path / "n.ipynb"
    made = [
        new_markdown_cell("%%llm\nno code"),
        new_code_cell(
            "import os\n%llm use tiny\n%config LLMMagics.user = 'ana'\nif x:\n    %llm use other\nprint('%llm use z')"
        ),
        new_code_cell("\n%%llm a << -t 0\nhello\nthere"),
        new_code_cell("%%llm"),
        new_code_cell("%%time\n%llm use never"),
        new_code_cell("%%llm_compare -m a,b\nhi"),
        new_code_cell("# %%llm\n%reload_ext llmkit"),
    ]
    nbformat.write(new_notebook(cells=made), path)
    found = read(str(path))
    assert found == [
        Line(2, "llm", "use tiny"),
        Line(2, "config", "LLMMagics.user = 'ana'"),
        Cell(3, made[2].id, "llm", "a << -t 0", "hello\nthere"),
        Cell(4, made[3].id, "llm", "", ""),
        Cell(6, made[5].id, "llm_compare", "-m a,b", "hi"),
        Line(7, "reload_ext", "llmkit"),
    ]


def test_an_older_notebook_is_read_as_well(tmp_path) -> None:
    path = tmp_path / "old.ipynb"
    sheet = {"cells": [{"cell_type": "code", "language": "python", "input": ["%%llm\n", "hi"], "outputs": []}]}
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [sheet]}
    path.write_text(json.dumps(old), "utf-8")
    assert [(each.magic, each.body) for each in read(str(path))] == [("llm", "hi")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '"text"',
        "12",
        '{"nbformat": 4}',
        '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 7}',
        '{"nbformat": 99, "nbformat_minor": 5, "metadata": {}, "cells": []}',
        "[" * 100_000,
        '{"nbformat": "\\u001b[31m", "cells": []}',
    ],
)
def test_what_is_no_notebook_is_one_clear_error(tmp_path, text) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="is no notebook") as raised:
        read(str(path))
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_strange_cells_are_passed_over(tmp_path) -> None:
    path = tmp_path / "n.ipynb"
    strange = [
        None,
        7,
        [],
        {},
        {"cell_type": "code"},
        {"cell_type": "code", "source": 7, "outputs": [], "metadata": {}},
    ]
    good = {"cell_type": "code", "source": ["%%llm\n", "hi", 7], "outputs": [], "metadata": {}, "execution_count": None}
    book = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [*strange, good]}
    path.write_text(json.dumps(book), "utf-8")
    try:
        found = read(str(path))
    except ConfigError as error:
        assert "is no notebook" in str(error)
    else:
        assert [each.body for each in found] == ["hi"]


def test_files_that_cannot_be_read_are_clear_errors(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no notebook gone\.ipynb"):
        read("gone.ipynb")
    written(tmp_path, "1")
    with pytest.raises(ConfigError) as raised:
        read("gone.ipynb")
    assert "n.ipynb" in raised.value.next_step
    with pytest.raises(ConfigError, match="cannot be read"):
        read(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read("a\0b.ipynb")
    with pytest.raises(ConfigError, match="it is no file"):
        read("/dev/zero")  # which has no end
    (tmp_path / "n.ipynb").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read("n.ipynb")


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch) -> None:
    path = written(tmp_path, *["%%llm\nhi"] * 5)
    monkeypatch.setattr(cells, "MOST_CELLS", 4)
    with pytest.raises(ConfigError, match="has 5 cells"):
        read(path)
    monkeypatch.setattr(cells, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="larger than"):
        read(path)
