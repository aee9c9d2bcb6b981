"""Prompt cells in a real kernel against a real engine (``docs/engines.md``)."""

import os
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager

from tests.engines.engine import cut_short

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


class Kernel:
    """A kernel, asked cell by cell; ``shown`` has what each cell showed, the last state of every display."""

    def __init__(self, folder) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, source, *, interrupt_after=None):
        """Run a cell. Gives its status, and the text of what it showed."""
        shown, displays = [], {}
        begun = None
        request = self.client.execute(source)
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind == "stream":
                shown.append(content["text"])
            elif kind == "error":
                shown.append("\n".join(content["traceback"]))
            elif kind in {"display_data", "execute_result", "update_display_data"}:
                name = content.get("transient", {}).get("display_id", len(displays))
                displays[name] = "\n".join(str(text) for mime, text in content["data"].items() if "text" in mime)
                if kind == "update_display_data" and displays[name]:
                    begun = begun or time.monotonic()  # a first piece of the answer is there
            if interrupt_after is not None and begun and time.monotonic() - begun > interrupt_after:
                self.manager.interrupt_kernel()
                interrupted, interrupt_after = time.monotonic(), None
        reply = self.client.get_shell_msg(timeout=60)
        while reply["parent_header"].get("msg_id") != request:  # late answers to "are you there?"
            reply = self.client.get_shell_msg(timeout=60)
        self.interrupted_for = time.monotonic() - interrupted if "interrupted" in locals() else None
        return reply["content"]["status"], "\n".join([*displays.values(), *shown])


@pytest.fixture
def kernel(folder):
    kernel = Kernel(folder)
    yield kernel
    kernel.close()


def test_a_prompt_cell_is_answered_by_the_engine(kernel, engine) -> None:
    status, shown = kernel.run("%load_ext llmkit")
    assert status == "ok"
    assert "model local (from llmkit.toml)" in shown
    assert "simulat" not in shown
    status, shown = kernel.run('who = "the cat"')
    status, shown = kernel.run("%%llm answer << --max-tokens 24 -t 0\nSay hello to {{ who }} in three words.")
    assert status == "ok", shown
    assert engine.provider in shown
    assert "24" in shown
    status, shown = kernel.run(
        "assert answer.text and answer.source == 'provider' and answer.usage.output_tokens == 24\n"
        f"assert answer.provider == {engine.provider!r} and answer.finish_reason == 'length'\n"
        "assert answer.call.messages[0].text == 'Say hello to the cat in three words.'"
    )
    assert status == "ok", shown


def test_a_cell_that_fails_is_one_short_block(kernel, vllm) -> None:
    kernel.run("%load_ext llmkit")
    status, shown = kernel.run('long = "the cat sat on the mat " * 2500')
    status, shown = kernel.run("%%llm\n{{ long }}")
    assert status == "error"
    assert "ContextTooLong" in shown
    assert "4096" in shown
    assert "Traceback" not in shown


def test_an_interrupt_of_the_kernel_stops_the_engine(kernel, vllm) -> None:
    kernel.run("%load_ext llmkit")
    kernel.run("%%llm --max-tokens 24\nhi")  # all is loaded
    with cut_short(vllm):
        status, shown = kernel.run("%%llm part << --max-tokens 4000\nTell me a long story.", interrupt_after=0.3)
    assert status == "error"
    assert kernel.interrupted_for < 1
    status, shown = kernel.run("print(part.outcome.status, len(part.text), part.usage.estimated)")
    assert status == "ok", shown
    word, length, estimated = shown.split()
    assert (word, estimated) == ("aborted", "True")
    assert int(length) > 0
    status, shown = kernel.run("%%llm --max-tokens 24\nhi")
    assert status == "ok", shown


def test_the_quickstart_runs_against_the_engine(kernel, engine) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            status, shown = kernel.run(cell.source)
            assert status == "ok", f"{cell.source}\n{shown}"
    status, shown = kernel.run(
        "with llmkit.Client() as client:\n"
        f'    asked = client.calls().query(\'provider == "{engine.provider}" and source == "provider"\')\n'
        "assert len(asked) == 7 and (asked.status == 'complete').all() and not asked.estimated.any(), asked"
    )
    assert status == "ok", shown
