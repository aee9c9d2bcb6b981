"""Each fault, as the client meets it: bytes, headers, errors, books. In process and over a socket where they differ."""

from __future__ import annotations

import asyncio
import json
from email.utils import parsedate_to_datetime

import httpx
import pytest

from llmkit.models.tokens import simulated_tokens
from llmkit.reply import Usage
from llmkit.testing import FakeClock, Fault, Simulator
from llmkit.testing.faults import FRAMINGS, USAGES
from tests.testing.asking import BOTH, PATHS, PROMPT, ask, blocks, connected, events, request, streamed, text_of

ANSWER = "Grüße an „alle“: one two three 🙂"
TOKENS = simulated_tokens(ANSWER)
ASKED = simulated_tokens(PROMPT)


def failing(fault, times=1, **settings):
    simulator = Simulator(**({"answer": ANSWER, "clock": FakeClock()} | settings))
    simulator.fail(fault, times)
    return simulator


def run(scenario, simulator, **options):
    async def main():
        async with connected(simulator, **options) as client:
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(main())


def whole(fault, wire="openai", **settings):
    return run(lambda client: ask(client, wire), failing(fault, **settings))


def stream(fault, wire="openai", *, socket=False, **settings):
    """The blocks, the error, and the simulator."""
    simulator = failing(fault, **settings)
    found, error = run(lambda client: blocks(client, wire), simulator, socket=socket)
    return found, error, simulator


SOCKETS = pytest.mark.parametrize("socket", [False, True], ids=["in process", "over a socket"])
WIRES = pytest.mark.parametrize("wire", BOTH)


class TestWhichCall:
    def outcomes(self, simulator, calls):
        async def scenario(client):
            return [(await ask(client)).status_code for _ in range(calls)]

        return run(scenario, simulator)

    def test_the_next_ones_in_the_order_they_were_told(self) -> None:
        simulator = failing(Fault.status(503), times=2)
        simulator.fail(Fault.status(429))
        assert self.outcomes(simulator, 5) == [503, 503, 429, 200, 200]
        assert [received.fault and received.fault.http_status for received in simulator.requests] == [
            503,
            503,
            429,
            None,
            None,
        ]

    def test_all_until_healed(self) -> None:
        simulator = failing(Fault.status(500), times=None)
        simulator.fail_rate(1, [Fault.status(501)])
        assert self.outcomes(simulator, 3) == [500] * 3
        simulator.heal()
        assert self.outcomes(simulator, 3) == [200] * 3

    def test_a_seeded_share(self) -> None:
        def pattern(seed):
            simulator = Simulator(answer="a")
            simulator.fail_rate(0.3, [Fault.status(500), Fault.status(502)], seed=seed)
            return self.outcomes(simulator, 200)

        once = pattern(1)
        assert once == pattern(1) != pattern(2)
        assert set(once) == {200, 500, 502}
        assert 35 <= sum(status != 200 for status in once) <= 85

    def test_lists_of_models_use_no_fault_up(self) -> None:
        simulator = failing(Fault.status(500))

        async def scenario(client):
            return (await client.get("/models")).status_code, (await ask(client)).status_code

        assert run(scenario, simulator) == (200, 500)

    def test_orders_that_make_no_sense(self) -> None:
        simulator = Simulator()
        for order, words in [
            (lambda: simulator.fail(Fault.empty(), times=0), "times is at least 1"),
            (lambda: simulator.fail_rate(2, [Fault.empty()]), "rate is a share"),
            (lambda: simulator.fail_rate(0.5, []), "at least one fault"),
            (lambda: Fault.status(200), "400 to 599"),
            (lambda: Fault.status(500, retry_form="weeks"), "seconds, date, ms"),
            (lambda: Fault.usage("odd"), "usage is one of"),
            (Fault.framing, "at least one of"),
            (lambda: Fault.framing("odd"), "framing is one of"),
        ]:
            with pytest.raises(ValueError, match=words):
                order()

    def test_faults_are_values_that_say_what_they_are(self) -> None:
        assert Fault.cut(after=2) == Fault.cut(after=2) != Fault.cut()
        assert repr(Fault.status(503, retry_after=2)) == "Fault.status(http_status=503, retry_after=2)"
        assert len({Fault.empty(), Fault.empty(), Fault.reset()}) == 2


class TestErrors:
    def test_retry_after_in_all_its_forms(self) -> None:
        seconds = whole(Fault.status(503, retry_after=2))
        assert (seconds.status_code, seconds.headers["retry-after"]) == (503, "2")
        assert whole(Fault.status(429, retry_after=0.25)).headers["retry-after"] == "0.25"
        assert whole(Fault.status(429, retry_after=0.25, retry_form="ms")).headers["retry-after-ms"] == "250"
        dated = whole(Fault.status(529, retry_after=7, retry_form="date"))
        moments = [parsedate_to_datetime(dated.headers[name]) for name in ("date", "retry-after")]
        assert (moments[1] - moments[0]).total_seconds() == 7
        assert moments[0].timestamp() == 1_767_225_600
        silent = whole(Fault.status(500))
        assert not {"retry-after", "retry-after-ms", "x-should-retry"} & set(silent.headers)

    def test_should_retry(self) -> None:
        assert whole(Fault.status(400, should_retry=True)).headers["x-should-retry"] == "true"
        assert whole(Fault.status(500, should_retry=False)).headers["x-should-retry"] == "false"

    @pytest.mark.parametrize(
        "status, openai, anthropic",
        [
            (400, "invalid_request_error", "invalid_request_error"),
            (403, "invalid_request_error", "permission_error"),
            (429, "requests", "rate_limit_error"),
            (500, "server_error", "api_error"),
            (529, "server_error", "overloaded_error"),
        ],
    )
    def test_the_shape_of_each_provider(self, status, openai, anthropic) -> None:
        fault = Fault.status(status, message="told so")
        ours, theirs = whole(fault).json(), whole(fault, "anthropic").json()
        assert (ours["error"]["type"], ours["error"]["message"]) == (openai, "told so")
        assert (theirs["type"], theirs["error"]) == ("error", {"type": anthropic, "message": "told so"})

    def test_quota(self) -> None:
        ours, theirs = whole(Fault.quota()), whole(Fault.quota(), "anthropic")
        assert (ours.status_code, ours.json()["error"]["code"]) == (429, "insufficient_quota")
        assert theirs.status_code == 400
        assert "credit balance is too low" in theirs.json()["error"]["message"]

    def test_a_refused_key_comes_back_in_the_error(self) -> None:
        for wire, headers in (("openai", {"Authorization": "Bearer sk-123"}), ("anthropic", {"x-api-key": "sk-123"})):
            response = run(lambda client, w=wire, h=headers: ask(client, w, headers=h), failing(Fault.auth()))
            assert response.status_code == 401
            assert response.json()["error"]["message"] == "Incorrect API key provided: sk-123."
        assert whole(Fault.auth(403)).status_code == 403

    def test_context_too_long(self) -> None:
        ours, theirs = whole(Fault.context_too_long()), whole(Fault.context_too_long(), "anthropic")
        assert (ours.status_code, theirs.status_code) == (400, 400)
        assert ours.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 4096 tokens" in ours.json()["error"]["message"]
        assert theirs.json()["error"]["message"] == "prompt is too long: 8192 tokens > 4096 maximum"

    def test_model_not_found(self) -> None:
        response = whole(Fault.model_not_found())
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")

    @SOCKETS
    @WIRES
    def test_errors_come_before_a_stream_and_cost_nothing(self, socket, wire) -> None:
        found, error, simulator = stream(Fault.status(503, retry_after=1), wire, socket=socket)
        assert error is None
        assert "error" in json.loads(b"".join(found))
        assert (simulator.billed, simulator.open, simulator.disconnects) == (Usage(), 0, 0)


class TestNoAnswer:
    @SOCKETS
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize(
        "fault, status, kind, start",
        [
            (Fault.html(), 502, "text/html", b"<!DOCTYPE html>"),
            (Fault.html(200), 200, "text/html", b"<!DOCTYPE html>"),
            (Fault.garbage(), 200, None, b"\x00\xff\xfe<<}{"),
            (Fault.empty(), 200, None, b""),
        ],
        ids=repr,
    )
    def test_bodies_that_are_nothing(self, fault, status, kind, start, socket, streaming) -> None:
        simulator = failing(fault)
        response = run(lambda client: ask(client, stream=streaming), simulator, socket=socket)
        assert response.status_code == status
        assert response.content.startswith(start)
        assert len(response.content) == int(response.headers["content-length"])
        assert response.headers["content-type"].startswith(kind or ("text/event" if streaming else "application/json"))
        assert (simulator.billed, simulator.open) == (Usage(), 0)

    @SOCKETS
    @WIRES
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_a_huge_body_is_made_while_it_is_read(self, socket, wire, streaming) -> None:
        size = 3_000_000
        simulator = failing(Fault.huge(size))
        response = run(lambda client: ask(client, wire, stream=streaming), simulator, socket=socket)
        assert abs(len(response.content) - size) < 10
        assert b"a" * 2_900_000 in response.content
        if not streaming:
            assert len(text_of(wire, response.json())) > 2_900_000
        assert simulator.billed == Usage()

    def test_a_huge_body_by_default(self) -> None:
        assert Fault.huge().size == 100_000_000

    @SOCKETS
    @WIRES
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_an_endless_body_ends_with_its_reader(self, socket, wire, streaming) -> None:
        simulator = failing(Fault.endless())

        async def scenario(client):
            content = b""
            async with client.stream("POST", PATHS[wire], json=request(wire, stream=streaming)) as response:
                async for block in response.aiter_raw():
                    content += block
                    if len(content) > 200_000:
                        break
            await asyncio.wait_for(simulator.until(lambda books: not books.open), 10)
            return content

        content = run(scenario, simulator, socket=socket)
        assert (simulator.disconnects, simulator.requests[0].state) == (1, "left")
        if streaming:
            happened = events(content[: content.rindex(b"\n\n")])
            assert len(happened) > 100
            assert streamed(wire, happened).endswith(" again again")
            assert simulator.billed.output_tokens >= len(happened) - 3
        else:
            assert content.endswith(b"aaa")
            assert simulator.billed == Usage()

    def test_an_endless_body_can_take_its_time(self) -> None:
        clock = FakeClock()

        async def scenario(client):
            async with client.stream("POST", "/chat/completions", json=request(stream=True)) as response:
                async for _ in response.aiter_raw():
                    if clock.now() > 5:
                        break

        simulator = failing(Fault.endless(token_delay_s=1), clock=clock)
        run(scenario, simulator)
        assert simulator.billed.output_tokens == 7


class TestConnection:
    def test_refused(self) -> None:
        simulator = failing(Fault.refused())
        with pytest.raises(httpx.ConnectError):
            run(ask, simulator)
        assert (simulator.calls, simulator.requests[0].state, simulator.requests[0].status) == (1, "broken", None)

    def test_reset(self) -> None:
        with pytest.raises(httpx.ReadError):
            run(ask, failing(Fault.reset()))

    @pytest.mark.parametrize("fault", [Fault.refused(), Fault.reset()], ids=repr)
    def test_over_a_socket_both_are_resets(self, fault) -> None:
        simulator = failing(fault)

        async def scenario(client):
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await ask(client)
            return (await ask(client)).status_code

        assert run(scenario, simulator, socket=True) == 200
        assert (simulator.calls, simulator.disconnects, simulator.open) == (2, 0, 0)
        assert simulator.requests[0].state == "broken"

    @SOCKETS
    @WIRES
    @pytest.mark.parametrize("after", [0, 1, 3, 99])
    def test_cut_in_the_middle_of_a_stream(self, socket, wire, after) -> None:
        found, error, simulator = stream(Fault.cut(after), wire, socket=socket)
        assert isinstance(error, httpx.RemoteProtocolError)
        shown = min(after, TOKENS)
        text = streamed(wire, events(found))
        assert simulated_tokens(text) == shown
        assert ANSWER.startswith(text)
        assert simulator.billed == (Usage(ASKED, shown) if shown else Usage())
        assert (simulator.requests[0].state, simulator.disconnects, simulator.open) == ("broken", 0, 0)

    @SOCKETS
    @WIRES
    def test_cut_in_the_middle_of_a_document(self, socket, wire) -> None:
        simulator = failing(Fault.cut(after=3))
        with pytest.raises(httpx.RemoteProtocolError):
            run(lambda client: ask(client, wire), simulator, socket=socket)
        assert simulator.billed == Usage(ASKED, TOKENS)

    @WIRES
    def test_stalls_and_hangs_take_no_time_on_a_fake_clock(self, wire) -> None:
        for fault in (Fault.hang(600), Fault.stall(after=2, seconds=600), Fault.slow(300, 0)):
            clock = FakeClock()
            found, error, _ = stream(fault, wire, clock=clock)
            assert error is None
            assert streamed(wire, events(found)) == ANSWER
            assert clock.now() == fault.seconds
            assert text_of(wire, whole(fault, wire).json()) == ANSWER

    def test_slow_is_slow_between_tokens_as_well(self) -> None:
        clock = FakeClock()
        stream(Fault.slow(5, 0.5), clock=clock)
        assert clock.now() == 5 + 0.5 * (TOKENS - 1)

    def test_a_stall_comes_where_it_was_ordered(self) -> None:
        clock = FakeClock(auto=False)
        simulator = failing(Fault.stall(after=2, seconds=50), clock=clock)
        found = []

        async def scenario(client):
            async def read():
                async with client.stream("POST", "/chat/completions", json=request(stream=True)) as response:
                    async for block in response.aiter_raw():
                        found.append(block)

            task = asyncio.create_task(read())
            await clock.advance(49)
            assert (len(found), simulator.requests[0].output_tokens) == (3, 2)
            await clock.advance(1)
            await task

        run(scenario, simulator)
        assert streamed("openai", events(found)) == ANSWER

    @SOCKETS
    @pytest.mark.parametrize("fault", [Fault.hang(), Fault.stall(after=0), Fault.stall(after=2)], ids=repr)
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    def test_waiting_ends_when_the_client_leaves(self, socket, fault, streaming) -> None:
        simulator = failing(fault, clock=FakeClock(auto=False))

        async def scenario(client):
            task = asyncio.create_task(ask(client, stream=streaming))
            await asyncio.wait_for(simulator.arrived(1), 10)
            assert simulator.open == 1
            task.cancel()
            await asyncio.wait([task])
            await asyncio.wait_for(simulator.until(lambda books: books.disconnects == 1), 10)

        run(scenario, simulator, socket=socket)
        assert (simulator.open, simulator.requests[0].state) == (0, "left")


class TestInsideTheAnswer:
    @SOCKETS
    @WIRES
    def test_no_done(self, socket, wire) -> None:
        found, error, simulator = stream(Fault.no_done(), wire, socket=socket)
        assert error is None
        assert streamed(wire, events(found)) == ANSWER
        assert b"[DONE]" not in b"".join(found)
        assert b"message_stop" not in b"".join(found)
        assert simulator.billed == Usage(ASKED, TOKENS)

    @SOCKETS
    @WIRES
    def test_a_garbage_frame(self, socket, wire) -> None:
        found, error, simulator = stream(Fault.garbage_frame(after=2), wire, socket=socket)
        assert error is None
        *good, bad = b"".join(found).decode().removesuffix("\n\n").split("\n\n")
        data = bad.split("data: ")[1]
        with pytest.raises(ValueError, match="Unterminated string"):
            json.loads(data)
        assert simulated_tokens(streamed(wire, events("\n\n".join(good).encode()))) == 2
        assert simulator.billed == Usage(ASKED, 2)
        with pytest.raises(ValueError):
            whole(Fault.garbage_frame(), wire).json()

    @SOCKETS
    @WIRES
    def test_an_error_inside_a_stream(self, socket, wire) -> None:
        found, error, simulator = stream(Fault.error_in_stream(after=1), wire, socket=socket)
        assert error is None
        *before, last = events(found)
        assert "server had an error" in last["error"]["message"]
        assert simulated_tokens(streamed(wire, before)) == 1
        assert simulator.billed == Usage(ASKED, 1)
        response = whole(Fault.error_in_stream(), wire)
        assert response.status_code == 200
        assert "error" in response.json()

    @WIRES
    @pytest.mark.parametrize("variant", USAGES)
    def test_usage(self, wire, variant) -> None:
        found, _, simulator = stream(Fault.usage(variant), wire, cached_tokens=1)
        happened = [event for event in events(found) if event != "[DONE]"]
        name = "output_tokens" if wire == "anthropic" else "completion_tokens"
        last = next((event["usage"] for event in reversed(happened) if "usage" in event), "absent")
        one = whole(Fault.usage(variant), wire).json().get("usage", "absent")
        told = {
            "none": "absent" if wire == "anthropic" else None,
            "null": None,
            "zero": 0,
            "negative": -TOKENS - 1,
            "text": "many",
            "huge": 10**30,
        }.get(variant, TOKENS)
        assert (last[name] if isinstance(last, dict) else last) == told
        assert (one[name] if isinstance(one, dict) else one) == ("absent" if variant == "none" else told)
        assert streamed(wire, happened) == ANSWER
        assert simulator.billed == Usage(ASKED, TOKENS, cached_input_tokens=1)

    def test_usage_in_unusual_places(self) -> None:
        found = [event for event in events(stream(Fault.usage("each_chunk"))[0]) if event != "[DONE]"]
        assert [event["usage"]["completion_tokens"] for event in found] == [*range(TOKENS + 1), TOKENS, TOKENS]
        found = events(stream(Fault.usage("with_choices"))[0])
        assert found[-2]["choices"][0]["delta"] == {}
        assert found[-2]["usage"]["completion_tokens"] == TOKENS
        assert events(stream(Fault.usage("none"))[0])[-2]["choices"][0]["finish_reason"] == "stop"

    def test_the_usage_of_all_answers(self) -> None:
        response = run(ask, Simulator(usage="none"))
        assert "usage" not in response.json()

    def test_refusal(self) -> None:
        message = whole(Fault.refusal()).json()["choices"][0]["message"]
        assert message["content"] is None
        assert message["refusal"] == "I'm sorry, but I can't help with that."
        found, _, simulator = stream(Fault.refusal())
        deltas = [event["choices"][0]["delta"] for event in events(found)[:-2]]
        assert "".join(delta.get("refusal") or "" for delta in deltas) == message["refusal"]
        assert not any(delta.get("content") for delta in deltas)
        assert simulator.billed == Usage(ASKED, 8)
        assert whole(Fault.refusal(), "anthropic").json()["stop_reason"] == "refusal"
        found, _, _ = stream(Fault.refusal(), "anthropic")
        assert events(found)[-2]["delta"]["stop_reason"] == "refusal"

    def test_content_filter(self) -> None:
        choice = whole(Fault.content_filter(after=1)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Grüße", "content_filter")
        theirs = whole(Fault.content_filter(after=0), "anthropic").json()
        assert (theirs["content"], theirs["stop_reason"]) == ([], "refusal")

    def test_reasoning_only(self) -> None:
        document = whole(Fault.reasoning_only()).json()
        assert document["choices"][0]["message"]["content"] is None
        assert document["choices"][0]["finish_reason"] == "length"
        assert document["usage"]["completion_tokens_details"] == {"reasoning_tokens": 64}
        simulator = failing(Fault.reasoning_only())
        found, _ = run(lambda client: blocks(client, max_tokens=9), simulator)
        assert streamed("openai", events(found)) == ""
        assert simulator.billed == Usage(ASKED, 9, reasoning_tokens=9)
        theirs = whole(Fault.reasoning_only(), "anthropic").json()
        assert [block["type"] for block in theirs["content"]] == ["thinking"]
        assert theirs["stop_reason"] == "max_tokens"


class TestFraming:
    @SOCKETS
    @WIRES
    @pytest.mark.parametrize("variant", FRAMINGS)
    def test_a_good_answer_in_other_clothes(self, socket, wire, variant) -> None:
        found, error, simulator = stream(Fault.framing(variant), wire, socket=socket)
        plain, _ = run(lambda client: blocks(client, wire), Simulator(answer=ANSWER))
        assert error is None
        assert events(found) == events(plain)
        assert simulator.billed == Usage(ASKED, TOKENS)
        assert (simulator.requests[0].state, simulator.disconnects) == ("complete", 0)
        if variant not in {"halves", "bytes", "glued"}:
            assert b"".join(found) != b"".join(plain)

    def test_what_each_of_them_does(self) -> None:
        def content(*variants):
            return stream(Fault.framing(*variants))[0]

        plain = b"".join(run(blocks, Simulator(answer=ANSWER))[0])
        assert {len(block) for block in content("bytes")} == {1}
        assert len(content("glued")) == 1
        assert any(_splits_a_character(block) for block in content("halves"))
        assert b"".join(content("halves")) == b"".join(content("bytes")) == b"".join(content("glued")) == plain
        assert b"".join(content("crlf")) == plain.replace(b"\n", b"\r\n")
        assert b"".join(content("no_space")) == plain.replace(b"data: ", b"data:")
        assert b": keep-alive\n\n:\ndata: " in b"".join(content("comments"))
        assert b"id: 7\nretry: 3000\nunknown: field\ndata: " in b"".join(content("extra_fields"))
        mixed = content("crlf", "comments", "no_space", "bytes")
        assert b": keep-alive\r\n\r\n:\r\ndata:{" in b"".join(mixed)
        assert {len(block) for block in mixed} == {1}

    @WIRES
    def test_documents_come_in_pieces_too(self, wire) -> None:
        for variant in FRAMINGS:
            assert text_of(wire, whole(Fault.framing(variant), wire).json()) == ANSWER


def _splits_a_character(block):
    try:
        block.decode()
    except UnicodeDecodeError:
        return True
    return False
