"""Identical calls in several processes at once: one request, really counted, with leaders that are really killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import llmkit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills of POSIX")

PATIENCE_S = 60.0


class Server:
    """Speaks OpenAI's format to any number of requests, and says of each just what the test wants, when it wants it.

    ``say`` is for one request by its number, from 1; with ``answer`` set, every request gets that at once.
    """

    def __init__(self, answer=None):
        self.answer = answer
        self.requests = 0
        self.gone = []  # numbers of the requests whose client went before the end
        self._queues = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = server.result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        async def end():
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def say(self, number, *pieces):
        """Texts, ``"END"``, or an HTTP status instead of an answer."""
        for piece in pieces:
            self._loop.call_soon_threadsafe(self._queue(number).put_nowait, piece)

    def until(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), (self.requests, self.gone)

    def _queue(self, number):
        return self._queues.setdefault(number, asyncio.Queue())

    def _note(self, change):
        with self._changed:
            change()
            self._changed.notify_all()

    async def _serve(self, reader, writer):
        number = 0
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            number = self.requests + 1
            self._note(lambda: setattr(self, "requests", number))
            for piece in self.answer or ():
                self._queue(number).put_nowait(piece)
            await self._tell(number, body.get("stream"), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self._note(lambda: self.gone.append(number))
        finally:
            writer.close()

    async def _tell(self, number, stream, reader, writer):
        leaving = asyncio.ensure_future(reader.read(1))
        pieces, begun = [], False
        try:
            while True:
                saying = asyncio.ensure_future(self._queue(number).get())
                await asyncio.wait({saying, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    saying.cancel()
                    raise ConnectionError
                piece = saying.result()
                if isinstance(piece, int):
                    body = b'{"error": {"message": "no"}}'
                    writer.write(_head(f"{piece} No", "application/json", len(body)) + body)
                    return await writer.drain()
                if stream and not begun:
                    writer.write(_head("200 OK", "text/event-stream"))
                    begun = True
                if piece == "END":
                    break
                pieces.append(piece)
                if stream:
                    writer.write(_event({"choices": [{"index": 0, "delta": {"content": piece}}]}))
                    await writer.drain()
            usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
            if stream:
                writer.write(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}))
                writer.write(b"data: [DONE]\n\n")
            else:
                message = {"role": "assistant", "content": "".join(pieces)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                body = json.dumps({"model": "m-1", "choices": [choice], "usage": usage}).encode()
                writer.write(_head("200 OK", "application/json", len(body)) + body)
            await writer.drain()
        finally:
            leaving.cancel()


def _head(status, kind, length=None):
    size = "" if length is None else f"content-length: {length}\r\n"
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{size}connection: close\r\n\r\n".encode()


def _event(data):
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'model': 'm-1', **data})}\n\n".encode()


def config(url, tmp_path):
    return llmkit.Config.of(
        environ={"TEST_KEY": "sk-fake-0123456789abcdefghijklmnop"},
        model="m",
        models={"m": {"provider": "own", "model": "m-1", "price": {"input": 1, "output": 2}}},
        providers={"own": {"base_url": url, "api_key_env": "TEST_KEY"}},
        retry={"attempts": 1},
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
    )


# Makes all calls of its third argument at once, and says what comes, a line of JSON each.
ASKS = """
    import asyncio, json, os, sys
    from pathlib import Path
    import llmkit
    from tests.test_single_flight import config

    def say(**what):
        print(json.dumps(what), flush=True)

    async def ask(client, number, prompt, stream, options):
        reply = None
        try:
            if stream:
                reply = await client.stream(prompt, **options)
                async for chunk in reply:
                    say(call=number, chunk=chunk.text)
            else:
                reply = await client.complete(prompt, **options)
        except llmkit.LLMKitError as error:
            text = error.reply.text if error.reply else None
            say(call=number, error=type(error).__name__, message=str(error), spent=str(error.spent), text=text)
        else:
            saved = reply.call.trail.saved
            say(call=number, text=reply.text, source=reply.source, cost=str(reply.cost_usd), id=reply.request_id,
                attempts=len(reply.attempts), saved=None if saved is None else str(saved))

    async def main():
        async with llmkit.AsyncClient(config=config(sys.argv[1], Path(sys.argv[2]))) as client:
            await asyncio.gather(*[ask(client, n, *call) for n, call in enumerate(json.loads(sys.argv[3]))])

    asyncio.run(main())
"""


class Asker:
    """A process that makes calls."""

    def __init__(self, server, tmp_path, *calls):
        command = [sys.executable, "-c", textwrap.dedent(ASKS), server.url, str(tmp_path), json.dumps(calls)]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def next(self):
        line = self._lines.get(timeout=PATIENCE_S)
        assert line is not None, "it ended"
        return line

    def until_chunks(self, text):
        """Wait until the chunks it got make ``text``."""
        got = ""
        while got != text:
            assert text.startswith(got), got
            got += self.next()["chunk"]

    def ends(self):
        """What it says in the end of each call, in their order."""
        found = {}
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            if "chunk" not in line:
                found[line["call"]] = line
        assert self._process.wait(PATIENCE_S) == 0
        return [found[number] for number in sorted(found)]

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def close(self):
        if self._process.poll() is None:
            self.kill()
        self._reader.join(PATIENCE_S)


@pytest.fixture
def askers(tmp_path):
    with contextlib.ExitStack() as stack:

        def started(server, *calls):
            asker = Asker(server, tmp_path, *calls)
            stack.callback(asker.close)
            return asker

        yield started


STREAM, WHOLE = ("a question", True, {}), ("a question", False, {})


def follows(tmp_path, number=1):
    """Wait until so many processes have said that they follow."""
    deadline = time.monotonic() + PATIENCE_S
    folder = tmp_path / "ledger.sqlite3.spool"
    while time.monotonic() < deadline:
        if folder.is_dir() and len(list(folder.iterdir())) >= number:
            return
        time.sleep(0.005)
    raise AssertionError("nobody follows")


def test_two_processes_pay_once_and_the_second_streams(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        server.say(1, "one ", "two ")
        leader.until_chunks("one two ")
        follower = askers(server, STREAM)
        follower.until_chunks("one two ")
        server.say(1, "three ")
        follower.until_chunks("three ")
        server.say(1, "four", "END")
        (led,), (followed,) = leader.ends(), follower.ends()
        assert server.requests == 1
    assert led["text"] == followed["text"] == "one two three four"
    assert (led["source"], led["cost"], led["attempts"]) == ("provider", "0.00005", 1)
    assert (followed["source"], followed["cost"], followed["attempts"], followed["saved"]) == (
        "coalesced",
        "0",
        0,
        "0.00005",
    )
    assert list((tmp_path / "ledger.sqlite3.spool").iterdir()) == []
    with llmkit.Client(config=config(server.url, tmp_path)) as client:
        rows = client.calls().set_index("request_id")
        again = client.complete("a question")
    assert rows.loc[followed["id"], "source"] == "coalesced"
    assert (rows.loc[followed["id"], "cost_usd"], rows.loc[followed["id"], "attempts"]) == (0, 0)
    assert (again.source, again.text) == ("cache", "one two three four")


def test_two_hundred_identical_calls_in_three_processes_are_one_request(tmp_path, askers) -> None:
    with Server() as server:
        processes = [askers(server, *[(STREAM, WHOLE)[n % 2] for n in range(67 - (p == 0))]) for p in range(3)]
        server.until(lambda: server.requests == 1)
        follows(tmp_path, 2)
        server.say(1, "one ", "two", "END")
        ends = [end for process in processes for end in process.ends()]
        assert server.requests == 1
    assert len(ends) == 200
    assert {end["text"] for end in ends} == {"one two"}
    assert sorted(end["cost"] for end in ends) == ["0"] * 199 + ["0.00005"]


def test_fifty_different_calls_are_fifty_requests(tmp_path, askers) -> None:
    with Server(answer=["one", "END"]) as server:
        calls = [(f"question {number}", True, {}) for number in range(50)]
        processes = [askers(server, *calls[:25]), askers(server, *calls[25:])]
        ends = [end for process in processes for end in process.ends()]
        assert (server.requests, len(ends)) == (50, 50)
    assert {end["source"] for end in ends} == {"provider"}


def test_other_samples_and_calls_without_the_cache_are_requests_of_their_own(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        server.say(1, "one ")
        leader.until_chunks("one ")
        other = askers(
            server,
            ("a question", True, {"repeat": 1}),
            ("a question", True, {"cache": "off"}),
            ("a question", True, {"cache": "refresh"}),
        )
        server.until(lambda: server.requests == 4)
        for number in range(1, 5):
            server.say(number, "x", "END")
        assert [end["source"] for end in other.ends()] == ["provider"] * 3
        assert leader.ends()[0]["text"] == "one x"


def test_only_follows_another_process_and_never_asks(tmp_path, askers) -> None:
    only = ("a question", False, {"cache": "only"})
    with Server() as server:
        assert askers(server, only).ends()[0]["error"] == "NotCached"
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        follower = askers(server, only)
        follows(tmp_path)
        server.say(1, "one", "END")
        assert (follower.ends()[0]["source"], leader.ends()[0]["source"]) == ("coalesced", "provider")
        assert server.requests == 1


def test_a_leader_killed_before_its_first_token_is_taken_over_by_exactly_one(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        followers = [askers(server, STREAM, WHOLE), askers(server, WHOLE, STREAM)]
        follows(tmp_path, 2)
        leader.kill()
        server.until(lambda: server.requests == 2)
        server.say(2, "one ", "two", "END")
        ends = [end for follower in followers for end in follower.ends()]
        assert server.requests == 2
    assert [end["text"] for end in ends] == ["one two"] * 4
    assert sorted(end["source"] for end in ends) == ["coalesced"] * 3 + ["provider"]


def test_a_leader_killed_in_mid_stream_is_taken_over_and_what_was_shown_goes_on(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        server.say(1, "one ", "two ")
        leader.until_chunks("one two ")
        followers = [askers(server, STREAM), askers(server, STREAM)]
        for follower in followers:
            follower.until_chunks("one two ")
        leader.kill()
        server.until(lambda: server.requests == 2)
        server.say(2, "one ", "two three", "END")
        ends = [follower.ends()[0] for follower in followers]
        assert server.requests == 2
    assert [end["text"] for end in ends] == ["one two three"] * 2
    assert sorted(end["source"] for end in ends) == ["coalesced", "provider"]


def test_a_leader_killed_in_mid_stream_whose_answer_comes_out_differently_says_so(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        server.say(1, "one ")
        leader.until_chunks("one ")
        showing, silent = askers(server, STREAM), askers(server, WHOLE)
        showing.until_chunks("one ")
        follows(tmp_path, 2)
        leader.kill()
        server.until(lambda: server.requests == 2)
        server.say(2, "something else", "END")
        (broken,) = showing.ends()
        assert (broken["error"], broken["text"]) == ("StreamBroken", "one ")
        assert "begins differently" in broken["message"]
        # Whoever took over: the other one has the answer, asked for once more at most.
        server.say(3, "something else", "END")
        assert silent.ends()[0]["text"] == "something else"
        assert server.requests <= 3


def test_a_leader_killed_right_after_the_end_leaves_the_answer_or_is_taken_over(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        followers = [askers(server, WHOLE), askers(server, WHOLE)]
        follows(tmp_path, 2)
        server.say(1, "one", "END")
        leader.until_chunks("one")
        leader.kill()
        server.say(2, "one", "END")
        ends = [follower.ends()[0] for follower in followers]
        assert server.requests <= 2
    assert [end["text"] for end in ends] == ["one"] * 2
    assert sum(end["cost"] != "0" for end in ends) == server.requests - 1


def test_a_follower_that_is_killed_touches_nobody(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        server.say(1, "one ")
        leader.until_chunks("one ")
        killed, follower = askers(server, STREAM), askers(server, STREAM)
        killed.until_chunks("one ")
        follower.until_chunks("one ")
        killed.kill()
        server.say(1, "two", "END")
        assert (leader.ends()[0]["text"], follower.ends()[0]["text"]) == ("one two", "one two")
        assert (server.requests, server.gone) == (1, [])


def test_a_failure_of_the_provider_is_shared_between_processes(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, STREAM)
        server.until(lambda: server.requests == 1)
        followers = [askers(server, STREAM, WHOLE, STREAM), askers(server, WHOLE)]
        follows(tmp_path, 2)
        server.say(1, 503)
        ends = [end for asker in (leader, *followers) for end in asker.ends()]
        assert server.requests == 1
    assert [end["error"] for end in ends] == ["ProviderOverloaded"] * 5
    assert {end["spent"] for end in ends} <= {"0", "0E-9"}


def test_the_leaders_deadline_is_its_own(tmp_path, askers) -> None:
    with Server() as server:
        leader = askers(server, ("a question", True, {"timeout": 3}))
        server.until(lambda: server.requests == 1)
        follower = askers(server, STREAM)
        follows(tmp_path)
        server.until(lambda: server.requests == 2)
        server.say(2, "one", "END")
        assert leader.ends()[0]["error"] == "TotalTimeout"
        assert (follower.ends()[0]["source"], server.requests) == ("provider", 2)


def test_two_clients_and_threads_of_one_process_pay_once_and_a_closed_leader_is_read_on(tmp_path) -> None:
    with Server() as server:
        settings = config(server.url, tmp_path)
        with llmkit.Client(config=settings) as ours, llmkit.Client(config=settings) as theirs:
            results = []
            server.say(1, "one ")
            leading = ours.stream("a question")
            thread = threading.Thread(target=lambda: results.append(theirs.complete("a question")))
            thread.start()
            flights = llmkit.flight._STATE.flights
            deadline = time.monotonic() + PATIENCE_S
            while not any(flight.followers for flight in flights.values()) and time.monotonic() < deadline:
                time.sleep(0.005)
            leading.close()
            assert leading.outcome is None
            server.say(1, "two", "END")
            thread.join(PATIENCE_S)
            assert (results[0].text, results[0].source) == ("one two", "coalesced")
            assert (server.requests, server.gone) == (1, [])
        rows = [(row["status"], row["source"]) for row in llmkit.ledger.Ledger.open(settings.state_url).calls()]
    assert sorted(rows) == [("complete", "coalesced"), ("complete", "provider")]


def test_a_lone_leader_that_is_closed_closes_its_socket_at_once(tmp_path) -> None:
    with Server() as server, llmkit.Client(config=config(server.url, tmp_path)) as client:
        server.say(1, "one ")
        with client.stream("a question") as reply:
            assert next(iter(reply)).text == "one "
        server.until(lambda: server.gone == [1])
        assert reply.outcome.status == "aborted"


def test_in_memory_each_client_asks_for_itself(tmp_path) -> None:
    with Server(answer=["one", "END"]) as server:
        settings = config(server.url, tmp_path).with_(state={"url": "memory"})

        async def main():
            async with llmkit.AsyncClient(config=settings) as ours, llmkit.AsyncClient(config=settings) as theirs:
                return await asyncio.gather(*[c.complete("a question") for c in (ours, ours, theirs, theirs)])

        replies = asyncio.run(main())
        assert sorted(reply.source for reply in replies) == ["coalesced", "coalesced", "provider", "provider"]
        assert server.requests == 2


def test_a_disabled_cache_shares_nothing(tmp_path) -> None:
    with Server(answer=["one", "END"]) as server:
        settings = config(server.url, tmp_path).with_(cache={"enabled": False})

        async def main():
            async with llmkit.AsyncClient(config=settings) as client:
                return await asyncio.gather(*[client.complete("a question") for _ in range(5)])

        assert {reply.source for reply in asyncio.run(main())} == {"provider"}
        assert server.requests == 5


def test_namespaces_share_nothing(tmp_path) -> None:
    with Server(answer=["one", "END"]) as server:
        settings = config(server.url, tmp_path).with_(cache={"namespace": "user"})

        async def main():
            async with llmkit.AsyncClient(config=settings) as client:
                asking = [client.complete("a question", user=user) for user in ("ana", "ana", "bo", "bo")]
                return await asyncio.gather(*asking)

        assert [reply.source for reply in asyncio.run(main())].count("provider") == server.requests == 2
