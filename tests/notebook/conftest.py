"""A server that is told what to answer, and a shell that has llmkit loaded."""

from __future__ import annotations

import atexit
import os

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from tests.notebook.server import Server


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(server, monkeypatch, tmp_path):
    """The notebook's folder, with settings whose default model is the server's."""
    (tmp_path / "llmkit.toml").write_text(server.settings(), "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LLMKIT_") and name != "LLMKIT_DATA_DIR"]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def bare():
    """A shell without llmkit."""
    InteractiveShell.clear_instance()
    # Without a history from the start: one that is switched off later keeps its thread.
    shell = InteractiveShell.instance(colors="nocolor", config=Config({"HistoryManager": {"enabled": False}}))
    yield shell
    if "llmkit" in shell.extension_manager.loaded:
        shell.run_line_magic("unload_ext", "llmkit")
    shell.history_manager.end_session()
    # Else hundreds of shells collect all garbage, one after the other, before the process ends: minutes.
    atexit.unregister(shell.atexit_operations)
    InteractiveShell.clear_instance()


@pytest.fixture
def shell(bare, folder):
    bare.run_line_magic("load_ext", "llmkit")
    return bare
