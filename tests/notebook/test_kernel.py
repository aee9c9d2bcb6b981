"""``%%llm`` in a real kernel: what the frontend is sent, in which order, and what an interrupt does."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

import llmkit
from tests.notebook.server import CUT, Gone, Step, refused, said, silent

ROOT = str(Path(llmkit.__file__).parent.parent)
WAIT_S = 30
HEAVY = "httpx aiohttp pandas numpy altair ipywidgets tiktoken genai_prices tenacity jinja2"


class Kernel:
    """A kernel, and what a frontend would show of the cell it runs."""

    def __init__(self, folder, env):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=WAIT_S)

    def send(self, code):
        """Begin a cell; its messages are read with `until` and `rest`."""
        self.id = self.client.execute(code)
        self.messages = []

    def until(self, done):
        """Read messages until ``done(message)``; returns that one."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != self.id:
                continue
            self.messages.append(message)
            if done(message):
                return message
            assert message["content"].get("execution_state") != "idle", f"not seen in {self.outputs()}"
        raise AssertionError(f"not seen in {self.outputs()}")

    def rest(self):
        """Read to the end of the cell; the status of its reply."""
        self.until(lambda m: m["msg_type"] == "status" and m["content"]["execution_state"] == "idle")
        while True:
            reply = self.client.get_shell_msg(timeout=WAIT_S)
            if reply["parent_header"].get("msg_id") == self.id:
                return reply["content"]["status"]

    def run(self, code):
        self.send(code)
        return self.rest()

    def outputs(self):
        """What is seen of the cell in the end: displays updated in place, without the frame that answers grew in."""
        outputs = []
        for message in self.messages:
            kind, content = message["msg_type"], message["content"]
            if kind == "update_display_data":
                ident = content["transient"]["display_id"]
                (shown,) = [o for o in outputs if o.get("transient", {}).get("display_id") == ident]
                shown.update(data=content["data"], metadata=content["metadata"])
            elif kind == "stream" and outputs and outputs[-1].get("name") == content["name"]:
                outputs[-1]["text"] += content["text"]  # a frontend joins them, too
            elif kind in {"display_data", "execute_result", "stream", "error"}:
                outputs.append({"kind": kind, **content})
        return [output for output in outputs if output.get("data") != {}]

    def value(self, expression):
        assert self.run(f"import json; print('\\x02' + json.dumps({expression}))") == "ok"
        (text,) = [o["text"] for o in self.outputs() if o["kind"] == "stream" and "\x02" in o["text"]]
        return json.loads(text.partition("\x02")[2])

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
    env |= {"PYTHONPATH": ROOT, "LLMKIT_OFFLINE": "1", "LLMKIT_DATA_DIR": str(folder / "data")}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": "default"}
    kernel = Kernel(folder, env)
    kernel.folder = folder
    yield kernel
    kernel.stop()


@pytest.fixture
def kernel(running, server):
    (running.folder / "llmkit.toml").write_text(server.settings(), "utf-8")
    assert running.run("%load_ext llmkit") == "ok"
    yield running
    assert running.run("%unload_ext llmkit") == "ok"


def three(kernel):
    """The cell's three outputs; where there are others, they are in the error."""
    outputs = kernel.outputs()
    assert len(outputs) == 3, outputs
    return outputs


def plain(output):
    return output["data"].get("text/plain", "")


def with_text(text):
    return lambda m: text in m["content"].get("data", {}).get("text/plain", "")


def test_an_answer_streams_and_ends_in_two_outputs(kernel, server) -> None:
    first, second = Step(), Step()
    server.next(said("The ", first, "whole ", second, "*answer*"))
    kernel.send("%%llm a <<\nhi")
    assert first.reached.wait(WAIT_S)
    shown = kernel.until(with_text("The "))
    assert shown["content"]["data"]["text/markdown"].startswith("The \n\n<div")  # the server has said no more than that
    first.go.set()
    assert second.reached.wait(WAIT_S)
    kernel.until(with_text("The whole "))
    second.go.set()
    assert kernel.rest() == "ok"
    answer, footer = kernel.outputs()
    assert answer["data"] == {"text/markdown": "The whole *answer*", "text/plain": "The whole *answer*"}
    about = answer["metadata"]["llmkit"]
    assert (about["model"], about["cost_usd"], about["source"]) == ("tiny-1", "0.000017", "provider")
    assert about["usage"]["input_tokens"] == 7
    assert plain(footer).startswith("tiny-1 · 7 → 5 tokens · $0.000017 · ")
    assert "<span>&#36;</span>0.000017" in footer["data"]["text/html"]
    assert kernel.value("[a.text, a is _, a.request_id]") == ["The whole *answer*", True, about["request_id"]]


def test_nothing_is_shown_twice_and_underscore_is_the_reply(kernel) -> None:
    assert kernel.run("%%llm\nhi") == "ok"
    assert [output["kind"] for output in kernel.outputs()] == ["display_data", "display_data"]
    assert kernel.run("_") == "ok"
    (result,) = kernel.outputs()
    assert result["kind"] == "execute_result"
    assert result["data"]["text/markdown"] == "Hello there."


def test_fast_chunks_do_not_flood_the_frontend(kernel, server) -> None:
    server.next(said(*["x "] * 3000))
    began = time.monotonic()
    assert kernel.run("%%llm\nhi") == "ok"
    seconds = time.monotonic() - began
    drawn = [m for m in kernel.messages if "text/markdown" in m["content"].get("data", {})]
    assert len(drawn) <= 2 + 10 * seconds
    assert kernel.outputs()[0]["data"]["text/plain"] == "x " * 3000


def test_a_wait_is_counted_down_in_the_cell(kernel, server) -> None:
    server.next(refused(503, "busy", retry_after="1.2"))
    assert kernel.run("%%llm\nhi") == "ok"
    shown = [plain(m["content"]) for m in kernel.messages if "data" in m["content"]]
    assert any(text == "vllm:tiny answered 503: busy; retrying in 2 s" for text in shown)
    assert any(text.endswith("retrying in 1 s") for text in shown)
    answer, footer = kernel.outputs()
    assert plain(answer) == "Hello there."
    assert "1 retry (503)" in plain(footer)


def test_an_error_fails_the_cell_and_keeps_the_partial_answer(kernel, server) -> None:
    server.next(said("The first half ", CUT))
    assert kernel.run("%%llm part <<\nhi") == "error"
    answer, footer, error = three(kernel)
    assert plain(answer) == "The first half "
    assert "broken off" in plain(footer)
    assert (error["kind"], error["ename"]) == ("error", "StreamBroken")
    assert error["traceback"][0].startswith("StreamBroken: vllm:tiny")
    assert len(error["traceback"]) < 10
    assert kernel.value("part.text") == "The first half "


def test_a_group_of_errors_is_an_error_message_too(kernel) -> None:
    assert kernel.run("%%llm -m deaf,deaf2\nhi") == "error"
    footer, error = kernel.outputs()
    assert "4 attempts" in plain(footer)
    assert error["ename"] == "AllModelsFailed"
    assert error["traceback"][0] == "AllModelsFailed: none of the 2 usable links of deaf,deaf2 answered"


def interrupt(kernel, gone):
    """Interrupt the kernel once the server is silent; seconds until the server saw the connection closed."""
    assert gone.reached.wait(WAIT_S)
    began = time.monotonic()
    kernel.manager.interrupt_kernel()
    assert gone.left.wait(WAIT_S)
    assert kernel.rest() == "error"
    return gone.at - began


def leftovers(kernel):
    return kernel.value(
        "__import__('asyncio').run_coroutine_threadsafe(__import__('asyncio').sleep(0, None), "
        "__import__('llmkit.portal').portal.shared().loop).result() or "
        "[repr(t) for t in __import__('asyncio').all_tasks(__import__('llmkit.portal').portal.shared().loop)]"
    )


def test_an_interrupt_closes_the_connection_at_once_and_keeps_the_text(kernel, server) -> None:
    took = []
    for _ in range(3):
        gone = Gone()
        server.next(said("The beginning ", gone))
        kernel.send("%%llm b <<\nhi")
        kernel.until(with_text("The beginning "))
        took.append(interrupt(kernel, gone))
    assert min(took) < 0.2
    answer, footer, error = three(kernel)
    assert plain(answer) == "The beginning "
    assert plain(footer).endswith("interrupted")
    assert error["ename"] == "Interrupted"
    assert error["traceback"][0] == "Interrupted: the connection is closed"
    assert kernel.value("[b.text, b.outcome.status, b is _]") == ["The beginning ", "aborted", True]
    assert leftovers(kernel) == []
    assert kernel.run("%%llm\nhi") == "ok"


def test_an_interrupt_before_the_first_token(kernel, server) -> None:
    gone = Gone()
    server.next(silent(gone))
    kernel.send("%%llm nothing <<\nhi")
    assert interrupt(kernel, gone) < 2
    footer, error = kernel.outputs()
    assert plain(footer).endswith("interrupted")
    assert "the provider may bill more" in error["traceback"][1]
    assert kernel.value("'nothing' in globals()") is False
    assert leftovers(kernel) == []


def test_an_interrupt_during_a_wait(kernel, server) -> None:
    server.next(refused(503, "busy", retry_after="60"))
    kernel.send("%%llm --timeout 100\nhi")
    kernel.until(lambda m: "retrying in 60 s" in m["content"].get("data", {}).get("text/plain", ""))
    kernel.manager.interrupt_kernel()
    assert kernel.rest() == "error"
    assert kernel.outputs()[-1]["ename"] == "Interrupted"
    assert len(server.requests) == 1


def test_loading_twice_and_unloading(kernel) -> None:
    assert kernel.run("%load_ext llmkit\n%load_ext llmkit") == "ok"
    assert kernel.run("%reload_ext llmkit") == "ok"
    assert kernel.outputs()[0]["text"] == (
        "llmkit: model tiny (from llmkit.toml) · caps for paid models: $0.50 a request, $5 a session, $20 a day "
        "(%llm budget off lifts them)\n"
    )
    assert kernel.run("%%llm\nhi") == "ok"


def test_loading_imports_nothing_heavy(folder) -> None:
    code = f"""
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        before = set(sys.modules)
        shell.run_line_magic("load_ext", "llmkit")
        print([name for name in {HEAVY.split()!r} if name in set(sys.modules) - before])
    """
    program = "\n".join(line.strip() for line in code.splitlines())
    env = {**os.environ, "PYTHONPATH": ROOT, "IPYTHONDIR": str(folder / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith("llmkit: model tiny")
