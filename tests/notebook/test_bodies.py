"""Cells that are a line and nothing more reach the magic, and are taken for what they are."""

from __future__ import annotations

import pytest

from llmkit.errors import ConfigError
from llmkit.notebook.bodies import with_body
from tests.notebook.test_magics import run


@pytest.mark.parametrize("line", ["%%llm --help", "%%llm\n", "%%llm_compare --with sum\n", "%%llm_eval x"])
def test_a_line_alone_gets_an_empty_body(line) -> None:
    assert with_body([line]) == [f"{line.rstrip()}\n", "\n"]


@pytest.mark.parametrize(
    "lines", [["%%llm?\n"], ["%%llmx\n"], ["%%time\n"], ["%llm\n"], ["x = 1\n"], ["%%llm\n", "hi\n"], []]
)
def test_everything_else_stays_as_it_is(lines) -> None:
    assert with_body(list(lines)) == lines


def test_an_empty_prompt_is_llmkits_own_error(shell, server) -> None:
    shown = run(shell, "%%llm")
    assert isinstance(shown.error, ConfigError)  # IPython's own would pass under nbval
    assert "the prompt is empty" in shown.error.message
    assert server.requests == []
    assert "--max-cost" in run(shell, "%%llm --help").stdout


def test_unloading_takes_it_back(bare, folder) -> None:
    before = list(bare.input_transformers_cleanup)
    run(bare, "%load_ext llmkit")
    assert len(bare.input_transformers_cleanup) == len(before) + 1
    run(bare, "%reload_ext llmkit")
    assert len(bare.input_transformers_cleanup) == len(before) + 1
    run(bare, "%unload_ext llmkit")
    assert bare.input_transformers_cleanup == before
