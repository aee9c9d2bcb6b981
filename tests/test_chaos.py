"""2,000 calls, 64 at once, a fifth of them hit by every fault there is: the books balance and nothing is left over."""

from __future__ import annotations

import asyncio
import collections
import gc
import itertools
import json
import os
import re
from collections.abc import Iterator
from decimal import Decimal

import pytest

import llmkit
from llmkit.budgets import Budgets
from llmkit.cache import AnswerCache
from llmkit.call import Call, Params, Timeouts, messages_from
from llmkit.config import BreakerSettings, Config
from llmkit.endpoint import Endpoint, Link, Price
from llmkit.flight import SingleFlight
from llmkit.layers import standard
from llmkit.layers.breaker import Breakers
from llmkit.ledger import Ledger
from llmkit.pipeline import Pipeline
from llmkit.providers.canonical import RequestKeys
from llmkit.providers.http import Provider
from llmkit.reply import Reply
from llmkit.state.entries import MemoryEntries
from llmkit.state.flights import FileFlights
from llmkit.testing import FakeClock, Fault, Received, Simulator

CALLS, AT_ONCE = 2_000, 64

FAULTS = [
    *[Fault.status(status) for status in (400, 403, 404, 408, 409, 425, 429, 500, 502, 503, 504, 529)],
    Fault.status(429, retry_after=2),
    Fault.status(503, retry_after=1, retry_form="date"),
    Fault.status(503, retry_after=1, retry_form="ms"),
    Fault.status(500, should_retry=False),
    Fault.quota(),
    Fault.auth(),
    Fault.context_too_long(),
    Fault.model_not_found(),
    Fault.html(502),
    Fault.html(200),
    Fault.garbage(),
    Fault.empty(),
    Fault.huge(40_000_000),
    Fault.refused(),
    Fault.reset(),
    Fault.cut(0),
    Fault.cut(3),
    Fault.no_done(),
    Fault.garbage_frame(),
    Fault.garbage_frame(0),
    Fault.error_in_stream(),
    Fault.error_in_stream(0),
    *[Fault.usage(variant) for variant in ("none", "null", "with_choices", "each_chunk")],
    *[
        Fault.framing(variant)
        for variant in ("halves", "bytes", "crlf", "comments", "no_space", "extra_fields", "glued")
    ],
    Fault.refusal(),
    Fault.content_filter(),
    Fault.reasoning_only(),
]
WAITING = [Fault.hang(), Fault.stall(0), Fault.stall(3), Fault.slow()]
LYING = ["zero", "negative", "text", "huge"]  # usages that are not what is billed


class Chaos:
    """The standard chain over a simulator, with the ledger on disk."""

    def __init__(self, simulator: Simulator, clock: llmkit.clock.Clock, tmp_path, wire: str, url: str | None) -> None:
        self.clock = clock
        self.ledger = Ledger.open(f"sqlite:///{tmp_path}/chaos.sqlite3", clock)
        # So much that it does not end the chaos: what nobody saw the end of counts at its worst case.
        plenty = {"session": {"usd": 10**6}, "day": {"usd": 10**6}}
        config = Config.of(environ={}, retry={"attempts": 3, "initial": 0.01, "maximum": 0.05}, budget=plenty)
        # A breaker that opened would end the chaos early; what it does has tests of its own.
        breakers = Breakers(BreakerSettings(failures=1000, rate=1.0, minimum_calls=1000), clock)
        self.provider = Provider(clock, environ={}, **({"simulator": simulator} if url is None else {}))
        self.flights = SingleFlight(str(tmp_path), clock, FileFlights(tmp_path / "chaos.sqlite3", clock))
        layers = standard(
            config,
            clock=clock,
            ledger=self.ledger,
            breakers=breakers,
            budgets=Budgets(config.budget),
            answers=AnswerCache(config.cache, clock, lambda: MemoryEntries(max_bytes=10**6, clock=clock)),
            key_of=RequestKeys(),
            flights=self.flights,
        )
        self.chain = Pipeline(layers, self.provider)
        endpoint = Endpoint(
            provider="test",
            model="m",
            wire=wire,
            base_url=url or "http://simulator.invalid/v1",
            simulated=url is None,
            price=Price(input=Decimal(1), output=Decimal(2)),
        )
        self.route = (Link(endpoint=endpoint),)
        self.errors: collections.Counter[str] = collections.Counter()
        self.replies = 0

    async def one(self, number: int, timeouts: Timeouts) -> None:
        started = self.clock.now()
        call = Call(
            request_id=f"{number:06d}",
            messages=messages_from(f"question {number} of many"),
            model="m",
            route=self.route,
            params=Params(max_tokens=200) if number % 3 else Params(),
            started=started,
            started_at=self.clock.time(),
            deadline=None if timeouts.total is None else started + timeouts.total,
            stream=number % 2 == 0,
            timeouts=timeouts,
        )
        try:
            reply = await self.chain(call)
            await self.read(reply, number)
        except llmkit.LLMKitError as error:
            self.errors[type(error).__name__] += 1
            assert error.request_id == call.request_id
            assert error.block()
        else:
            assert reply.text or reply.outcome.status == "aborted"
            self.replies += 1

    async def read(self, reply: Reply, number: int) -> None:
        if number % 50 == 0:  # some readers leave early
            await reply.aclose()
        else:
            await reply.read()

    async def all(self, timeouts: Timeouts) -> None:
        numbers = iter(range(CALLS))

        async def worker() -> None:
            for number in numbers:
                await self.one(number, timeouts)

        await asyncio.gather(*[worker() for _ in range(AT_ONCE)])

    def attempts(self) -> list[dict]:
        return list(itertools.chain.from_iterable(self.ledger.attempts(c["request_id"]) for c in self.ledger.calls()))

    def pairs(self, simulator: Simulator) -> Iterator[tuple[Received, dict]]:
        """Each request that arrived with the attempt that sent it."""
        requests: dict[str, list[Received]] = collections.defaultdict(list)
        for request in simulator.requests:
            asked = request.body["messages"][-1]["content"]
            number = re.search(r"question (\d+) of", asked if isinstance(asked, str) else json.dumps(asked))
            requests[f"{int(number[1]):06d}"].append(request)
        for request_id, received in requests.items():
            yield from zip(received, self.ledger.attempts(request_id), strict=True)


async def nothing_is_left(before: int) -> None:
    gc.collect()
    for _ in range(200):
        await asyncio.sleep(0)
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not tasks, tasks
    if before:
        assert open_files() <= before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_every_call_ends_and_the_books_balance(tmp_path, monkeypatch, wire: str) -> None:
    # Fake hours pass while a real thread is at work, so a commit must not have to wait for a checkpoint.
    monkeypatch.setattr("llmkit.state.database.CHANGES_A_CHECKPOINT", 10**9)

    async def main() -> None:
        clock = FakeClock()
        simulator = Simulator(clock=clock, keep=10 * CALLS)
        simulator.fail_rate(0.2, [*FAULTS, *WAITING], seed=7)
        chaos = Chaos(simulator, clock, tmp_path, wire, None)
        before = open_files()
        await chaos.all(Timeouts(first_token=10, idle=10, total=100, first_token_set=True))
        await chaos.flights.aclose()
        await chaos.provider.aclose()

        assert chaos.replies + sum(chaos.errors.values()) == CALLS
        assert chaos.replies > CALLS * 0.85
        assert len(chaos.errors) > 10, chaos.errors
        calls, attempts = chaos.ledger.calls(), chaos.attempts()
        assert len(calls) == CALLS
        assert not [call for call in calls if call["status"] == "in_flight"]
        assert len(attempts) == simulator.calls == sum(call["attempts"] for call in calls)
        assert simulator.open == 0
        unknown = 0
        for request, attempt in chaos.pairs(simulator):
            if attempt["output_tokens"] is None and attempt["maybe_billed"]:
                # A whole answer that was lost on its way: nobody here can know what it cost, and the row says so.
                assert attempt["status"] == "failed"
                unknown += 1
                continue
            booked = [attempt[kind] or 0 for kind in ("input_tokens", "output_tokens", "reasoning_tokens")]
            billed = request.billed
            assert booked == [billed.input_tokens, billed.output_tokens, billed.reasoning_tokens], (request, attempt)
        assert 0 < unknown < CALLS * 0.1
        chaos.ledger.close()
        await nothing_is_left(before)

    asyncio.run(main())


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_the_same_over_real_sockets(tmp_path, wire: str) -> None:
    simulator = Simulator(keep=10 * CALLS)
    simulator.fail_rate(0.2, [*FAULTS, Fault.hang(), Fault.stall(3)], seed=11)

    async def main(url: str) -> Chaos:
        before = open_files()
        chaos = Chaos(simulator, llmkit.clock.SystemClock(), tmp_path, wire, f"{url}/v1")
        await chaos.all(Timeouts(first_token=2, idle=2, total=60, first_token_set=True))
        await chaos.flights.aclose()
        await chaos.provider.aclose()
        chaos.ledger.close()
        await nothing_is_left(before)
        return chaos

    with simulator.server(port=0) as url:
        chaos = asyncio.run(main(url.removesuffix("/v1").rstrip("/")))
        simulator.wait_until(lambda it: it.open == 0)
    assert chaos.replies + sum(chaos.errors.values()) == CALLS
    attempts = chaos.attempts()
    assert len(attempts) == simulator.calls
    # What was on its way when a connection broke is known to one side only, so tokens are compared on whole replies.
    whole = [(request, attempt) for request, attempt in chaos.pairs(simulator) if not attempt["maybe_billed"]]
    assert len(whole) > CALLS * 0.85
    for request, attempt in whole:
        if not attempt["estimated"]:
            assert (attempt["output_tokens"] or 0) == request.billed.output_tokens, (request, attempt)


def test_a_report_that_lies_harms_nobody(tmp_path) -> None:
    async def main() -> None:
        clock = FakeClock()
        simulator = Simulator(clock=clock)
        simulator.fail_rate(1.0, [Fault.usage(variant) for variant in LYING], seed=3)
        chaos = Chaos(simulator, clock, tmp_path, "openai", None)
        for number in range(40):
            await chaos.one(number, Timeouts())
        assert not chaos.errors
        assert all(a["status"] in {"complete", "aborted"} for a in chaos.attempts())
        assert all(0 <= (a["input_tokens"] or 0) <= 10**12 for a in chaos.attempts())
        chaos.ledger.close()

    asyncio.run(main())
