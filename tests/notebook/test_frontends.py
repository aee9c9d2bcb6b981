"""Front ends and what people do in their cells: VS Code's protocol, interrupts, several kernels, forks, threads, loops."""

from __future__ import annotations

import os
import time

import pytest

from llmkit.ledger import Ledger
from tests.notebook.server import Gone, Step, refused, said, silent
from tests.notebook.test_kernel import ROOT, WAIT_S, Kernel, kernel, leftovers, running, with_text  # noqa: F401

SECOND = 1.5
"""An interrupted cell ends within a second; two cores that others use as well get a little more."""


# -- VS Code -------------------------------------------------------------------------------------------------------------


class VSCode:
    """Cells as VS Code's Jupyter extension sends them."""

    def __init__(self, kernel):  # noqa: F811
        self.kernel = kernel

    def send(self, code, *, silent=False, store_history=True, cell="X10sZmlsZQ=="):
        """Metadata names the cell; its own questions beside cells are silent and leave no history."""
        client = self.kernel.client
        content = {
            "code": code,
            "silent": silent,
            "store_history": store_history,
            "user_expressions": {"llmkit_seen": "'llm' in get_ipython().magics_manager.magics['cell']"},
            "allow_stdin": True,
            "stop_on_error": True,
        }
        message = client.session.msg("execute_request", content, metadata={"cellId": cell, "deletedCells": []})
        client.shell_channel.send(message)
        self.kernel.id, self.kernel.messages = message["header"]["msg_id"], []

    def rest(self):
        """All of the reply's content."""
        self.kernel.until(lambda m: m["msg_type"] == "status" and m["content"]["execution_state"] == "idle")
        while True:
            reply = self.kernel.client.get_shell_msg(timeout=WAIT_S)
            if reply["parent_header"].get("msg_id") == self.kernel.id:
                return reply["content"]


def test_vs_code_gets_an_answer_within_its_cell(kernel, server) -> None:  # noqa: F811
    step = Step()
    server.next(said("The ", step, "answer"))
    code = VSCode(kernel)
    code.send("%%llm a <<\r\nhi\r\n\r\nthere")
    assert step.reached.wait(WAIT_S)
    kernel.until(with_text("The "))
    step.go.set()
    reply = code.rest()
    assert reply["status"] == "ok"
    assert reply["user_expressions"]["llmkit_seen"]["data"]["text/plain"] == "True"
    kinds = {message["msg_type"] for message in kernel.messages}
    assert kinds <= {"status", "execute_input", "display_data", "update_display_data"}  # no widgets, no comms
    shown = [o for o in kernel.outputs() if o["data"].get("text/plain")]
    assert [o["data"]["text/plain"].partition(" · ")[0] for o in shown] == ["The answer", "tiny-1"]
    assert server.requests[-1]["messages"][-1]["content"].split() == ["hi", "there"]
    assert "\r" not in server.requests[-1]["messages"][-1]["content"]


def test_vs_code_asks_silently_beside_cells(kernel, server) -> None:  # noqa: F811
    code = VSCode(kernel)
    code.send("import sys; sys.executable", silent=True, store_history=False)
    assert code.rest()["status"] == "ok"
    assert kernel.outputs() == []
    code.send("%%llm b <<\nhi", store_history=False)
    assert code.rest()["status"] == "ok"
    assert kernel.value("b.text") == "Hello there."
    code.send("%%llm -m deaf\nhi")
    reply = code.rest()
    assert (reply["status"], reply["ename"]) == ("error", "ProviderUnreachable")
    assert reply["evalue"]
    assert [output["kind"] for output in kernel.outputs()].count("error") == 1


# -- interrupts ----------------------------------------------------------------------------------------------------------


def interrupted(kernel, times=1):  # noqa: F811
    """Seconds until the cell had ended."""
    began = time.monotonic()
    for _ in range(times):
        kernel.manager.interrupt_kernel()
    assert kernel.rest() == "error"
    took = time.monotonic() - began
    assert kernel.outputs()[-1]["ename"] in {"Interrupted", "KeyboardInterrupt"}
    assert leftovers(kernel) == []
    return took


def test_two_interrupts_in_quick_succession(kernel, server) -> None:  # noqa: F811
    gone = Gone()
    server.next(said("The beginning ", gone))
    kernel.send("%%llm c <<\nhi")
    kernel.until(with_text("The beginning "))
    assert interrupted(kernel, times=2) < SECOND
    assert gone.left.wait(WAIT_S)
    assert kernel.run("%%llm\nhi") == "ok"
    assert kernel.value("__import__('llmkit').Client().calls()['status'].iloc[-2]") == "aborted"


def test_an_interrupt_of_a_call_that_waits_for_another_kernels_answer(kernel, server, second) -> None:  # noqa: F811
    step = Step()
    server.next(said("From the other: ", step, "the end"))
    second.send("%%llm d <<\nthe same question")
    second.until(with_text("From the other: "))
    kernel.send("%%llm d <<\nthe same question")
    kernel.until(with_text("From the other: "))  # it follows
    assert interrupted(kernel) < SECOND
    step.go.set()
    assert second.rest() == "ok"
    assert second.value("d.text") == "From the other: the end"
    assert len(server.requests) == 1


def test_an_interrupt_of_a_wait_between_attempts_books_what_was_spent(kernel, server) -> None:  # noqa: F811
    server.next(refused(503, "busy", retry_after="60"))
    kernel.send("%%llm --timeout 100\nhi")
    kernel.until(lambda m: "retrying in" in m["content"].get("data", {}).get("text/plain", ""))
    assert interrupted(kernel) < SECOND
    assert kernel.value("float(__import__('llmkit').Client().budgets()['held'].astype(float).sum())") == 0


def test_an_interrupt_of_a_wait_for_room_in_a_budget(kernel, server, second) -> None:  # noqa: F811
    step = Step()
    server.next(said("What is held ", step, "for"))
    for each in (kernel, second):
        assert each.run("%llm budget user.zoe.total=0.001usd") == "ok"
    second.send("%%llm --user zoe --max-tokens 400 --cache off\nhi")
    second.until(with_text("What is held "))
    kernel.send("%%llm --user zoe --max-tokens 400 --cache off\nhi there")
    shown = kernel.until(lambda m: "zoe" in m["content"].get("data", {}).get("text/plain", ""))
    assert "held by calls in flight" in shown["content"]["data"]["text/plain"]
    assert interrupted(kernel) < SECOND
    assert len(server.requests) == 1
    step.go.set()
    assert second.rest() == "ok"


# -- several kernels, one store ----------------------------------------------------------------------------------------------


@pytest.fixture
def more(running, server):  # noqa: F811
    """Starts further kernels beside ``kernel``, in the same folder and on the same store."""
    kernels = []

    def start():
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
        env |= {"PYTHONPATH": ROOT, "LLMKIT_OFFLINE": "1", "LLMKIT_DATA_DIR": str(running.folder / "data")}
        env |= {"IPYTHONDIR": str(running.folder / "ipython")}
        kernels.append(Kernel(running.folder, env))
        assert kernels[-1].run("%load_ext llmkit") == "ok"
        return kernels[-1]

    yield start
    for each in kernels:
        each.stop()


@pytest.fixture
def second(kernel, more):  # noqa: F811
    return more()


BUSY = """
for number in range(15):
    get_ipython().run_cell_magic("llm", "--quiet --cache off --user {name}", f"{name} {{number}}")
    get_ipython().run_cell_magic("llm", "--quiet --user {name}", f"shared {{number % 3}}")
"""


def test_three_kernels_write_one_store_at_once(kernel, server, more) -> None:  # noqa: F811
    kernels = {"ana": kernel, "ben": more(), "eva": more()}
    for name, each in kernels.items():
        each.send(BUSY.format(name=name))
    for each in kernels.values():
        assert each.rest() == "ok"
        assert each.outputs() == []  # no word of locks
    deadline, found = time.monotonic() + WAIT_S, []
    while len(found) < 90 and time.monotonic() < deadline:  # calls from the cache are written a moment later
        rows = "__import__('llmkit').Client()._client.ledger.calls()"
        found = kernel.value(f"[[row['user'], row['status']] for row in {rows} if row['user'] in {list(kernels)}]")
    assert sorted(found) == sorted([name, "complete"] for name in kernels for _ in range(30))
    assert kernel.value("float(__import__('llmkit').Client().budgets()['held'].astype(float).sum())") == 0


# -- processes, threads and loops ----------------------------------------------------------------------------------------------

POOL = """
import multiprocessing, llmkit, warnings
from concurrent.futures import ProcessPoolExecutor
warnings.simplefilter("ignore", DeprecationWarning)
client = llmkit.Client()
client.complete("before")
def work(number):
    return client.complete(f"question {number}").text
def cell(number):
    get_ipython().run_cell_magic("llm", "mine << --quiet", f"cell {number}")
    return get_ipython().user_ns["mine"].text
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    texts = list(pool.map(work, range(4), timeout=20)) + list(pool.map(cell, range(2), timeout=20))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_cell_that_forks_workers(kernel, server) -> None:  # noqa: F811
    assert kernel.run("%%llm\nbefore") == "ok"
    assert kernel.run(POOL) == "ok", kernel.outputs()
    assert kernel.value("texts") == ["Hello there."] * 6
    assert kernel.run("%%llm\nafter") == "ok"
    assert kernel.value("client.complete('after all').text") == "Hello there."


CELLS = {
    "the kernel's own loop": """
import llmkit
asking = llmkit.AsyncClient()
assert (await asking.complete("hi")).text == "Hello there."
await asking.aclose()
""",
    "beside a task of the user's": """
import asyncio
ticking = asyncio.get_running_loop().create_task(asyncio.sleep(0.01))
get_ipython().run_cell_magic("llm", "--quiet", "hi")
await ticking
""",
    "a thread": """
import threading
done = []
thread = threading.Thread(target=lambda: done.append(get_ipython().run_cell_magic("llm", "t << --quiet", "hi")))
thread.start()
thread.join(20)
assert done == [None] and t.text == "Hello there."
""",
    "a function": """
def ask(prompt):
    get_ipython().run_cell_magic("llm", "f << --quiet", f"{prompt}, please")
    return get_ipython().user_ns["f"].text
assert ask("hi") == "Hello there."
""",
}


@pytest.mark.parametrize("code", CELLS.values(), ids=CELLS)
def test_where_a_cell_may_ask_from(kernel, code) -> None:  # noqa: F811
    assert kernel.run(code) == "ok", kernel.outputs()
    assert kernel.outputs() == []


def test_other_magics_around_a_cell(kernel) -> None:  # noqa: F811
    assert kernel.run("%%capture kept\n%%llm\nhi") == "ok"
    assert kernel.outputs() == []
    assert kernel.value("'Hello there.' in str([o.data for o in kept.outputs]) and kept.stderr") == ""
    assert kernel.run("%%time\n%%llm g <<\nhi") == "ok"
    assert kernel.value("g.text") == "Hello there."
    assert kernel.run("%time _ = get_ipython().run_cell_magic('llm', '--quiet', 'hi')") == "ok"


def test_prompts_of_all_kinds(kernel, server) -> None:  # noqa: F811
    for text in ("  \n\nindented\n\n", "“Ünïcode” 日本語 🎉 \u200d", "x" * 3_900_000):
        assert kernel.run(f"%%llm --quiet --raw --cache off --max-cost 4.5\n{text}") == "ok", kernel.outputs()
        assert server.requests[-1]["messages"][-1]["content"].strip() == text.strip()


def test_an_interrupt_before_anything_is_sent(kernel, server) -> None:  # noqa: F811
    gone = Gone()
    server.next(silent(gone))
    kernel.send("%%llm\nhi")
    assert gone.reached.wait(WAIT_S)
    assert interrupted(kernel) < SECOND
    assert gone.left.wait(WAIT_S)
    ledger = Ledger.open(f"sqlite:///{kernel.folder}/data/ledger.sqlite3")
    assert ledger.calls(limit=1)[0]["status"] == "aborted"
    ledger.close()
