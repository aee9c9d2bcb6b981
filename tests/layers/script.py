"""A provider that follows a script, for tests of what stands above it."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from llmkit.call import Call, Timeouts, Trail, messages_from
from llmkit.endpoint import Endpoint, Link, Price
from llmkit.reply import Chunk, Head, Outcome, Reply, Usage, settled
from llmkit.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from llmkit.events import Event
    from llmkit.pipeline import CallNext, Layer

HANG = object()  # never answers
PAID = Price(input=Decimal(1), output=Decimal(2))  # USD per million tokens


def endpoint(model: str = "m", **changes: Any) -> Endpoint:
    return Endpoint(provider="test", model=model, base_url="http://127.0.0.1:9/v1", **{"price": PAID, **changes})


def call_for(
    clock: FakeClock, *links: Link | Endpoint, prompt: str = "hi", events: list[Event] | None = None, **changes: Any
) -> Call:
    route = tuple(link if isinstance(link, Link) else Link(endpoint=link) for link in links or (endpoint(),))
    timeouts = changes.setdefault("timeouts", Timeouts())
    deadline = None if timeouts.total is None else clock.now() + timeouts.total
    return Call(
        **{
            "request_id": "r1",
            "messages": messages_from(prompt),
            "model": "m",
            "route": route,
            "link": route[0],
            "started": clock.now(),
            "started_at": clock.time(),
            "deadline": deadline,
            "stream": True,
            "trail": Trail(listener=events.append if events is not None else None),
            **changes,
        }
    )


class Script:
    """The end of a chain. Each call takes the next step:

    an error is raised; a text or a list of pieces is streamed, in which an error breaks the stream and `HANG` stalls
    it; `HANG` alone never answers; a function gets the call and gives a step.
    """

    def __init__(self, clock: FakeClock, *steps: Any) -> None:
        self.clock = clock
        self.steps = list(steps)
        self.calls: list[Call] = []
        self.closed = 0
        self.open = 0

    async def __call__(self, call: Call) -> Reply:
        self.calls.append(call)
        await call.sends()
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if callable(step):
            step = step(call)
        if isinstance(step, BaseException):
            raise step
        if step is HANG:
            await self.clock.sleep(1e9)
        pieces = [step] if isinstance(step, str) else list(step)
        return self._reply(call, pieces)

    def _reply(self, call: Call, pieces: list[Any]) -> Reply:
        head = Head()
        head.finish_reason = "stop"
        self.open += 1

        async def rest() -> AsyncIterator[list[Chunk]]:
            for piece in pieces[1:]:
                if isinstance(piece, BaseException):
                    raise piece
                if piece is HANG:
                    await self.clock.sleep(1e9)
                else:
                    await asyncio.sleep(0)
                    yield [Chunk(piece)]
            head.usage = Usage(input_tokens=10, output_tokens=len(pieces))

        async def close() -> None:
            self.closed += 1
            self.open -= 1

        return Reply(call, rest(), head=head, clock=self.clock, first=[Chunk(pieces[0])], provider="test", close=close)


def chain(layer: Layer, below: CallNext) -> CallNext:
    async def run(call: Call) -> Reply:
        return await layer(call, below)

    return run


async def outcomes(run: CallNext, call: Call) -> tuple[Reply | None, BaseException | None, list[str]]:
    """Read a call to its end; the statuses that a hook above the layer saw (there must be exactly one)."""
    seen: list[str] = []

    async def hook(outcome: Outcome) -> None:
        seen.append(outcome.status)

    try:
        reply = await settled(run(call), hook)
    except BaseException as error:
        return None, error, seen
    try:
        await reply.read()
    except Exception as error:
        return reply, error, seen
    return reply, None, seen


def run(main: Callable[[], Any]) -> Any:
    """`asyncio.run`, and no task may be left over."""

    async def checked() -> Any:
        result = await main()
        for _ in range(50):
            await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, left
        return result

    return asyncio.run(checked())
