"""A notebook that was run and saved with the live display passes nbval's strict comparison."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import llmkit
from tests.notebook.server import refused, said
from tests.notebook.strict import nbval

ROOT = str(Path(llmkit.__file__).parent.parent)
CELLS = [
    "%load_ext llmkit",
    "%%llm -o answer\nslowly",
    "%%llm --cache refresh\na retry",
    "%%llm\nbroken in the middle",
    "%%llm --format json\nas data",
    "print(answer.text[:5])",
]


@pytest.fixture
def environment(monkeypatch, folder):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
    kept |= {
        "PYTHONPATH": ROOT,
        "LLMKIT_OFFLINE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "LLMKIT_CACHE_ENABLED": "0",
    }
    return kept


def answers(server, seconds):
    """What the server says to the notebook, with pauses of ``seconds``."""

    def pause(handler):
        time.sleep(seconds)

    server.next(said(pause, "Here is *an* ", pause, "answer:\n\n```python\nx = 1", pause, "\n```\n", pause))
    server.next(refused(503, "busy", retry_after=str(seconds)), said("There."))
    server.next(said(pause, "Half an ", pause, "answer", finish="length"))
    server.next(said('{"a": ', pause, "[1, 2]}"))


@pytest.fixture
def saved(server, folder, environment, monkeypatch):
    """The notebook, run and saved with the live display."""
    for name in [name for name in os.environ if name.startswith("LLMKIT_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    answers(server, 0.25)
    NotebookClient(book, resources={"metadata": {"path": str(folder)}}, kernel_name="python3").execute()
    path = folder / "saved.ipynb"
    nbformat.write(book, path)
    return path


def sanitize():
    command = [sys.executable, "-m", "llmkit", "sanitize"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def shown(path):
    cells = nbformat.read(path, as_version=4).cells
    return [[output.get("data", {}).get("text/plain", output.get("text")) for output in cell.outputs] for cell in cells]


def test_a_saved_notebook_holds_the_answers_and_passes(saved, server, environment) -> None:
    frame, answer, footer = shown(saved)[1]
    assert frame is None
    assert answer == "Here is *an* answer:\n\n```python\nx = 1\n```\n"
    assert footer.startswith("tiny-1 · 7 → 5 tokens · $0.000017 · ")
    assert "1 retry (503)" in shown(saved)[2][-1]
    about = nbformat.read(saved, as_version=4).cells[1].outputs[1].metadata.llmkit
    assert (about.model, about.source) == ("tiny-1", "provider")

    for seconds, display in [(0.4, "live"), (0.0, "final")]:  # the second has no frame at all
        answers(server, seconds)
        done = nbval(
            saved.parent, environment | {"LLMKIT_DISPLAY": display}, "--nbval-sanitize-with", sanitize(), saved.name
        )
        assert done.returncode == 0, done.stdout

    answers(server, 0.0)
    server.script.get()
    server.next(said("Another answer"))
    done = nbval(saved.parent, environment | {"LLMKIT_DISPLAY": "live"}, saved.name)
    assert done.returncode == 1
    failed = set(re.findall(r"Cell (\d+): Cell outputs differ", re.sub(r"\x1b\[\d*m", "", done.stdout)))
    assert failed >= {"1", "2"}, "strict: another answer fails, and without the file another time does"
