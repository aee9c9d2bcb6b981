"""A language model service that is not there: two wire formats, exact books, and faults on demand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from llmkit.clock import SystemClock
from llmkit.reply import Usage
from llmkit.testing.books import Answered, Headers, Received, Settings, added
from llmkit.testing.exchange import Broken, Exchange, parsed
from llmkit.testing.faults import USAGES, Fault, Script
from llmkit.testing.wires import ANTHROPIC, CREATED, OPENAI, Rejected, Wire, dumps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from llmkit.clock import Clock

__all__ = ["Simulator"]


class Simulator(httpx.AsyncBaseTransport):
    """Answers OpenAI's ``/v1/chat/completions`` and Anthropic's ``/v1/messages``, streamed or not.

    It is an httpx transport (``httpx.AsyncClient(transport=simulator)``), and a real server where one is needed
    (`serve`, `server`). The same request gets the same bytes; prompt, model, temperature and seeds change them.
    A token is a word with the white space before it, and a stream has one event for each.

    Args:
        answer: the text of every answer, or a function of the request's JSON that gives it; None invents one.
        seed: another one gives other answers.
        clock: all waiting goes through it; with the `FakeClock` that the client has, too, a hang takes no time.
        latency_s: seconds before the head of each response.
        token_delay_s: seconds between two tokens.
        models: names that exist; empty: every name does.
        usage: how usage is reported, one of `llmkit.testing.faults.USAGES`.
        reasoning_tokens: spent on reasoning before each answer.
        show_reasoning: whether OpenAI's format shows that reasoning; Anthropic's always does.
        cached_tokens: input tokens reported as read from a cache, as far as the input goes.
        window: most input tokens; more is the provider's error for that. None: no limit.
        keep: how many of the latest requests `requests` holds.

    Attributes:
        idempotent: set it to True, and a repeated ``Idempotency-Key`` is answered again without being billed again, and
            refused where it comes with another request, as by services that take the header. 10,000 keys are known.
        requests: what arrived, oldest first.
        calls: how many calls arrived, bad ones and failing ones included; lists of models are no calls.
        open: how many are being served now.
        disconnects: how many calls the client left before their end.
    """

    def __init__(
        self,
        answer: str | Callable[[dict[str, Any]], str] | None = None,
        *,
        seed: int = 0,
        clock: Clock | None = None,
        latency_s: float = 0.0,
        token_delay_s: float = 0.0,
        models: Sequence[str] = (),
        usage: str = "right",
        reasoning_tokens: int = 0,
        show_reasoning: bool = False,
        cached_tokens: int = 0,
        window: int | None = None,
        keep: int = 1000,
    ) -> None:
        if usage not in USAGES:
            raise ValueError(f"usage is one of {', '.join(USAGES)}, not {usage!r}")
        self.requests: deque[Received] = deque(maxlen=keep)
        self.calls = 0
        self.open = 0
        self.disconnects = 0
        self._settings = Settings(
            answer=answer,
            seed=seed,
            clock=clock or SystemClock(),
            latency_s=latency_s,
            token_delay_s=token_delay_s,
            models=tuple(models),
            usage=usage,
            reasoning_tokens=reasoning_tokens,
            show_reasoning=show_reasoning,
            cached_tokens=cached_tokens,
            window=window,
        )
        self._script = Script()
        self._lock = threading.RLock()
        self._serving: set[Received] = set()
        self._settled = Usage()
        self.idempotent = False
        self._answered: dict[str, Answered] = {}
        self._waiting: list[tuple[Callable[[Simulator], bool], concurrent.futures.Future[None]]] = []

    def __repr__(self) -> str:
        return f"<Simulator {self.calls} calls, {self.open} open>"

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def fail(self, fault: Fault, times: int | None = 1) -> None:
        """Let ``fault`` happen to the next ``times`` calls (None: to all), after what was ordered before."""
        with self._lock:
            self._script.order(fault, times)

    def fail_rate(self, rate: float, faults: Sequence[Fault], *, seed: int = 0) -> None:
        """Let one of ``faults`` happen to this share of the calls that `fail` does not speak of, by seeded chance."""
        with self._lock:
            self._script.chance(rate, faults, seed)

    def heal(self) -> None:
        """Forget all faults; calls that are failing already go on failing."""
        with self._lock:
            self._script.clear()

    # -- the books ---------------------------------------------------------------------------------------------------

    @property
    def billed(self) -> Usage:
        """All tokens that a provider would bill by now: of streams that broke or were left, what had been sent."""
        with self._lock:
            return added([self._settled, *(received.billed for received in self._serving)])

    async def until(self, condition: Callable[[Simulator], bool]) -> None:
        """Wait, without sleeping, until ``condition(simulator)`` holds; it is asked whenever the books change."""
        await asyncio.wrap_future(self._promise(condition))

    async def arrived(self, calls: int) -> None:
        """Wait until so many calls have arrived."""
        await self.until(lambda simulator: simulator.calls >= calls)

    def wait_until(self, condition: Callable[[Simulator], bool], timeout: float = 10.0) -> None:
        """`until`, for threads without an event loop.

        Raises:
            TimeoutError: it did not come to that within ``timeout`` real seconds.
        """
        self._promise(condition).result(timeout)

    def _promise(self, condition: Callable[[Simulator], bool]) -> concurrent.futures.Future[None]:
        promise: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._waiting.append((condition, promise))
            self._changed()
        return promise

    def _changed(self) -> None:
        """Tell those who wait. The lock is held."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for condition, promise in waiting:
            if promise.done():
                continue
            if condition(self):
                promise.set_result(None)
            else:
                self._waiting.append((condition, promise))

    # -- serving -----------------------------------------------------------------------------------------------------

    def receive(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Exchange | Plain:
        """Take a request in and enter it into the books; what comes back must be served and closed."""
        lowered = Headers({name.lower(): value for name, value in headers.items()})
        received = Received(method, path, lowered, parsed(body) if body else None)
        wire = _wire_of(method, path)
        with self._lock:
            self.requests.append(received)
            if wire is None:
                return Plain(*self._page(received))
            self.calls += 1
            self.open += 1
            received.number = self.calls
            received.fault = self._script.next()
            received.repeats = self._answered.get(_key_of(received))
            self._serving.add(received)
            self._changed()
        return Exchange(received, wire, self._settings, self._closed)

    def _closed(self, received: Received) -> None:
        with self._lock:
            self.open -= 1
            self.disconnects += received.state == "left"
            self._serving.discard(received)
            self._settled = added([self._settled, received.billed])
            if self.idempotent and _key_of(received) and (received.repeats or received.billed != Usage()):
                self._remember(received)
            self._changed()

    def _remember(self, received: Received) -> None:
        """That this request was answered, or a part of it. The lock is held."""
        key = _key_of(received)
        before = self._answered.pop(key, None)
        if before is None or before.body == received.body:
            bills = [received.billed] if before is None else [before.billed, received.billed]
            before = Answered(received.body, added(bills))
        self._answered[key] = before
        if len(self._answered) > _MOST_KEYS:
            del self._answered[next(iter(self._answered))]

    def _page(self, received: Received) -> tuple[int, dict[str, Any]]:
        """What is not a call: lists of models, token counts, errors about paths."""
        path = received.path.rstrip("/")
        if path.endswith("/models") and received.method == "GET":
            received.status, page = 200, self._models(anthropic="anthropic-version" in received.headers)
        elif path.endswith("/messages/count_tokens") and received.method == "POST":
            received.status, page = _counted(received.body)
        elif path.endswith(_PATHS):
            received.status, page = 405, OPENAI.error("invalid", 405, f"Not allowed: {received.method[:20]}")
        else:
            received.status, page = 404, OPENAI.error("invalid", 404, "Unknown URL; the simulator answers "
                                                      "/v1/chat/completions, /v1/messages and /v1/models")  # fmt: skip
        received.state = "complete"
        return received.status, page

    def _models(self, *, anthropic: bool) -> dict[str, Any]:
        names = self._settings.models or ("simulator",)
        if anthropic:
            items = [{"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"}
                     for name in names]  # fmt: skip
            return {"data": items, "has_more": False, "first_id": names[0], "last_id": names[-1]}
        extra: dict[str, Any] = {"max_model_len": self._settings.window} if self._settings.window else {}
        listed: list[dict[str, Any]] = [{"id": name, "object": "model", "created": CREATED, "owned_by": "llmkit-simulator"} | extra
                 for name in names]  # fmt: skip
        return {"object": "list", "data": listed}

    # -- in process --------------------------------------------------------------------------------------------------

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """httpx's transport interface. Raises what httpx raises when a real connection fails so."""
        body = await request.aread()
        serving = self.receive(request.method, request.url.path, request.headers, body)
        if isinstance(serving, Plain):
            return httpx.Response(serving.status, json=serving.document, request=request)
        try:
            status, headers = await serving.head()
        except Broken as broken:
            if broken.how == "refused":
                raise httpx.ConnectError("All connection attempts failed", request=request) from None
            raise httpx.ReadError("Connection reset by peer", request=request) from None
        return httpx.Response(status, headers=headers, stream=_Body(serving), request=request)

    async def aclose(self) -> None:
        """httpx clients close their transport when they end; the simulator outlives them."""

    # -- as a server -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
        """Serve over HTTP while the block runs; gives the base URL, ``http://127.0.0.1:PORT/v1``. Port 0 is a free one."""
        from llmkit.testing.server import Server

        server = Server(self)
        url = await server.start(host, port)
        try:
            yield url
        finally:
            await server.stop()

    @contextmanager
    def server(self, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
        """`serve`, for code without an event loop: on a thread of its own, which is gone when the block ends."""
        started: concurrent.futures.Future[str] = concurrent.futures.Future()
        stop: list[Callable[[], object]] = []

        async def run() -> None:
            stopped = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
            async with self.serve(port, host) as url:
                started.set_result(url)
                await stopped.wait()

        def thread_main() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

        thread = threading.Thread(target=thread_main, name="llmkit-simulator", daemon=True)
        thread.start()
        try:
            url = started.result()
        except Exception:
            thread.join()  # it could not start, so it ends by itself; its loop may be closed already
            raise
        try:
            yield url
        finally:
            stop[0]()
            thread.join()

    def run_forever(
        self, host: str = "127.0.0.1", port: int = 0, on_start: Callable[[str], object] | None = None
    ) -> None:
        """Serve until interrupted (Ctrl-C), then return. ``on_start`` gets the base URL once the port listens.

        Raises:
            OSError: the port cannot be had.
        """

        async def run() -> None:
            async with self.serve(port, host) as url:
                if on_start is not None:
                    on_start(url)
                await asyncio.Event().wait()

        try:
            asyncio.run(run())
        except KeyboardInterrupt:
            return


class Plain:
    """A response that is no call: always whole, never failing, in no book but the list of requests."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document

    @property
    def content(self) -> bytes:
        return dumps(self.document).encode("utf-8", "replace")


class _Body(httpx.AsyncByteStream):
    """The body of an `httpx.Response`, made while it is read."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._blocks = exchange.body()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for block in self._blocks:
                yield block
        except Broken:
            raise httpx.RemoteProtocolError(
                "peer closed connection without sending complete message body (incomplete chunked read)"
            ) from None

    async def aclose(self) -> None:
        self._exchange.close("left")
        await self._blocks.aclose()


_PATHS = ("/chat/completions", "/messages")
_MOST_KEYS = 10_000


def _key_of(received: Received) -> str:
    return received.headers.get("idempotency-key", "")


def _wire_of(method: str, path: str) -> Wire | None:
    if method != "POST":
        return None
    path = path.rstrip("/")
    if path.endswith("/chat/completions"):
        return OPENAI
    return ANTHROPIC if path.endswith("/messages") else None


def _counted(body: Any) -> tuple[int, dict[str, Any]]:
    try:
        ask = ANTHROPIC.ask({"max_tokens": 1, **body} if isinstance(body, dict) else {})
    except Rejected as rejected:
        return 400, ANTHROPIC.error("invalid", 400, str(rejected))
    return 200, {"input_tokens": ask.input_tokens}
