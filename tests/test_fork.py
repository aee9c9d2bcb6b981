"""Processes that fork in the midst of calls: the child has its own loop and connections, and the parent loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from llmkit.ledger import Ledger
from tests.notebook.server import Gone, Server, Step, said

WAIT_S = 30

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

HEAD = """
import json, os, sys, threading, time, warnings
import llmkit
from llmkit.state.owner import current_owner

warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is the point

def say(what):
    print(json.dumps(what), flush=True)

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(2)
        sys.exit(0)  # with all that an interpreter does at its end
    return child

def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

client = llmkit.Client()
"""


class Script:
    """A Python process whose lines of JSON are read one by one."""

    def __init__(self, code, folder):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
        environ |= {"LLMKIT_DATA_DIR": str(folder / "data"), "LLMKIT_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + code],
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def tell(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ended(self):
        """What it says last, once it has ended well and without a word of complaint."""
        out, err = self.process.communicate(timeout=2 * WAIT_S)
        assert (self.process.returncode, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(tmp_path, server):
    (tmp_path / "llmkit.toml").write_text(server.settings(), "utf-8")
    scripts = []

    def start(code):
        scripts.append(Script(code, tmp_path))
        return scripts[-1]

    yield start
    for script in scripts:
        script.process.kill()
        script.process.communicate()


def rows(tmp_path):
    ledger = Ledger.open(f"sqlite:///{tmp_path}/data/ledger.sqlite3")
    found = ledger.calls()
    ledger.close()
    return found


HELD = "float(client.budgets()['held'].astype(float).sum())"

IN_A_STREAM = f"""
client.complete("before")  # a connection that is kept alive
reply = client.stream("a stream of the parent's")
say(reply.text)

def work():
    assert client.complete("a call of the child's").text == "Hello there."
    with client.stream("a stream of the child's") as own:
        assert "".join(chunk.text for chunk in own) == "Hello there."
    try:
        next(iter(reply))
    except RuntimeError as error:
        assert "process" in str(error)
    else:
        raise AssertionError("the child read its parent's stream")
    client.close()

say(code_of(forked(work)))
say("".join(chunk.text for chunk in reply))
say(client.complete("after").text)
say({HELD})
say(current_owner())
"""


def test_a_fork_in_the_middle_of_a_stream(start, server, tmp_path) -> None:
    step = Step()
    server.next(said("Before."), said("The beginning ", step, "and the end."))
    script = start(IN_A_STREAM)
    assert script.hear() == "The beginning "
    assert script.hear() == 0  # the child has ended, in full
    step.go.set()
    whole, after, held, owner = script.ended()
    assert (whole, after, held) == ("The beginning and the end.", "Hello there.", 0)
    found = rows(tmp_path)
    assert [row["status"] for row in found] == ["complete"] * 5
    assert Counter(row["owner"] == owner for row in found) == {True: 3, False: 2}
    assert all(row["cost_usd"] is not None and row["cost_usd"] > 0 for row in found)


WHILE_A_CHILD_LIVES = """
reply = client.stream("a stream of the parent's")
reading, writing = os.pipe()
child = forked(lambda: (os.close(writing), os.read(reading, 1)))  # until told, or until the parent is gone
reply.close()
say(reply.outcome.status)
sys.stdin.readline()
os.write(writing, b".")
say(code_of(child))
"""


def test_the_server_sees_the_parent_leave_although_a_child_lives(start, server) -> None:
    gone = Gone()
    server.next(said("The beginning ", gone))
    script = start(WHILE_A_CHILD_LIVES)
    assert script.hear() == "aborted"
    assert gone.left.wait(WAIT_S)  # the child is still there, with a copy of each descriptor
    script.tell()
    assert script.ended() == [0]


WORKERS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def work(number):
    texts = [client.complete(f"question {number}").text, client.complete(f"question {number}").text]  # the second is stored
    return texts, current_owner()

client.complete("before")
with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
    waiting = [pool.submit(work, number) for number in range(9)]
    mine = [client.complete(f"meanwhile {number}").text for number in range(9)]
    done = [each.result(20) for each in waiting]
process = multiprocessing.get_context("fork").Process(target=work, args=(9,))
process.start()
process.join(20)
say([process.exitcode, mine, [texts for texts, _ in done], sorted({owner for _, owner in done}), current_owner()])
say(HELD)
""".replace("HELD", HELD)


def test_workers_call_through_the_client_of_their_parent(start, tmp_path) -> None:
    (code, mine, texts, owners, parent), held = start(WORKERS).ended()
    assert (code, held) == (0, 0)
    assert mine == ["Hello there."] * 9
    assert texts == [["Hello there."] * 2] * 9
    assert parent not in owners
    found = rows(tmp_path)
    assert Counter((row["owner"] == parent, row["source"]) for row in found) == {
        (True, "provider"): 10,
        (False, "provider"): 10,
        (False, "cache"): 10,
    }


UNDER_LOAD = """
going = True

def load(number):
    count = 0
    while going:
        count += 1
        client.complete(f"load {number} {count}")
        client.complete(f"load {number} {count}")
    counts.append(count)

counts = []
threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
client.complete("the first")
codes = []
for number in range(12):
    codes.append(code_of(forked(lambda: client.complete(f"child {number}"))))
going = False
for thread in threads:
    thread.join()
say([codes, len(counts)])
say([2 * sum(counts) + 13, current_owner(), HELD])
""".replace("HELD", HELD)


@pytest.mark.parametrize("state", ["", '[state]\nurl = "memory"\n'])
def test_no_lock_that_a_thread_holds_stops_a_child(start, server, tmp_path, state) -> None:
    (tmp_path / "llmkit.toml").write_text(server.settings() + state, "utf-8")
    (codes, threads), (calls, owner, held) = start(UNDER_LOAD).ended()
    assert codes == [0] * 12
    assert threads == 4
    assert held == 0
    if not state:
        found = rows(tmp_path)
        assert len(found) == calls
        assert Counter(row["owner"] == owner for row in found)[False] == 12
        assert {row["status"] for row in found} == {"complete"}


IMPORTING = """
import llmkit.lock, pathlib
pathlib.Path("slow.py").write_text("import __main__; __main__.began.set(); assert __main__.go.wait(20); done = True")
sys.path.insert(0, "")
began, go = threading.Event(), threading.Event()
thread = threading.Thread(target=lambda: __import__("slow"))
thread.start()
assert began.wait(20)
threading.Timer(0.05, go.set).start()

def work():
    import slow
    assert slow.done

say(code_of(forked(work)))
thread.join()
"""


def test_a_fork_waits_for_what_another_thread_imports(start) -> None:
    assert start(IMPORTING).ended() == [0]
