"""What a Python user holds: `AsyncClient`, and `Client`, the same without ``await``.

Both go down the same chain. `Client` is a bridge of one line a method to the background loop of `llmkit.portal`, so it
works in a script, in a notebook whose own loop runs, and from several threads at once.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from llmkit import tape
from llmkit.alerts import Alerts
from llmkit.budgets import Budgets
from llmkit.cache import AnswerCache
from llmkit.call import Call, Message, Trail, digest_of
from llmkit.clock import Clock, SystemClock
from llmkit.config import Config
from llmkit.errors import ConfigError, LLMKitError
from llmkit.layers import standard
from llmkit.layers.breaker import Breakers
from llmkit.layers.budget import Budget
from llmkit.ledger import Ledger
from llmkit.options import Options
from llmkit.pipeline import Pipeline
from llmkit.reply import settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
    from datetime import datetime, tzinfo
    from decimal import Decimal

    import httpx
    import pandas as pd

    from llmkit.comparison import Comparison
    from llmkit.endpoint import Link
    from llmkit.events import AlertRaised
    from llmkit.flight import SingleFlight
    from llmkit.layers.replay import Recordist, Replay
    from llmkit.plan import Plan
    from llmkit.portal import Portal
    from llmkit.prompts import Prompts
    from llmkit.reply import Reply
    from llmkit.state.database import Database
    from llmkit.state.shared import Circuits, Contents, Entries
    from llmkit.state.sharing import Shared

__all__ = ["AsyncClient", "Client"]

_MOST_TEMPLATES = 256


class AsyncClient:
    """Calls to language models through llmkit's chain.

    Args:
        config: settings read elsewhere; by default ``llmkit.toml`` and the environment are read.
        transport: an `httpx.AsyncBaseTransport` to send through, instead of llmkit's own and of the built-in simulator:
            an `httpx.MockTransport`, or a `llmkit.testing.Simulator` with faults to come. What it answers is this
            client's alone: it is cached in memory, never in the store that real calls look into.
        clock: time, sleep and chance; for tests.
        on_alert: called with an `llmkit.events.AlertRaised` when spending is unusual (``[alerts]``), on the event loop's
            thread, so it must not block; one that fails is logged.
        settings: single settings over the config, by their names in the file (``model="…"``, ``timeout={"total": 60}``).

    One client serves any number of tasks, threads and event loops.
    """

    def __init__(
        self,
        *,
        config: Config | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        on_alert: Callable[[AlertRaised], object] | None = None,
        **settings: Any,
    ) -> None:
        from llmkit.providers.canonical import RequestKeys
        from llmkit.providers.http import Provider
        from llmkit.state.circuits import SQLiteCircuits
        from llmkit.state.owner import current_owner
        from llmkit.state.sharing import open_shared

        self.config = Config.load(**settings) if config is None else config.with_(**settings) if settings else config
        self.clock: Clock = clock or SystemClock()
        self._shared = shared = open_shared(self.config.state_url, self.clock, self.config.environ)
        if shared is None:
            self.ledger = Ledger.open(self.config.state_url, self.clock)
            circuits: Circuits = SQLiteCircuits(functools.partial(_database, self.ledger), self.clock)
        else:
            self.ledger = Ledger("sqlite", self.clock, accounts=shared.accounts)
            circuits = shared.circuits
        self._budgets = Budgets(self.config.budget)
        self.ledger.on_held, self.ledger.on_ended = self._budgets.held, self._budgets.ended
        if self.config.state_on_failure == "refuse":
            self.ledger.is_strict = self._budgets.is_set
        self.circuits = Breakers(self.config.breaker, self.clock, circuits, current_owner)
        self.cache = AnswerCache(
            self.config.cache,
            self.clock,
            functools.partial(_entries, self.config, self.clock, shared, alone=transport is not None),
        )
        self._flights = _flights(self.config, self.clock, shared, f"memory {id(self)}", is_alone=transport is not None)
        self._provider = Provider(
            self.clock,
            transport=transport,
            simulator=transport,
            offline=self.config.offline,
            environ=self.config.environ,
        )
        self._pipeline = Pipeline(
            standard(
                self.config,
                clock=self.clock,
                ledger=self.ledger,
                breakers=self.circuits,
                budgets=self._budgets,
                answers=self.cache,
                key_of=RequestKeys(),
                flights=self._flights,
            ),
            self._provider,
        )
        # Of the ledger and the budgets, not of the client: in a ring, one that is dropped would not go in order.
        spent_since = functools.partial(_spent_since, self.ledger)
        self._alerts = Alerts(
            self.config.alerts, functools.partial(_zone, self._budgets), spent_since, self.clock, on_alert
        )
        self._model: str | None = None
        self._templates: dict[str, Call] = {}
        self._arriving: WeakSet[Reply] = WeakSet()
        self._tape: Recordist | Replay | None = tape.of_environment(self.config, self.clock)
        _CLIENTS.add(self)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def complete(self, prompt: str | Message | Sequence[Message | Mapping[str, Any]], **options: Any) -> Reply:
        """Ask, and wait for the whole answer.

        Args:
            prompt: text, a `Message`, or a list of messages.
            options: see `llmkit.options.Options`: ``model``, ``system``, ``max_tokens``, ``max_cost``, ``timeout``, ``user``, ``tags`` …

        Raises:
            LLMKitError: what happened, what was spent, what to do next; ``error.reply`` holds a partial answer.
        """
        reply = await self._open(prompt, stream=False, options=options)
        await reply.read()
        return reply

    def stream(self, prompt: str | Message | Sequence[Message | Mapping[str, Any]], **options: Any) -> Opening:
        """Ask, and read the answer as it arrives: ``async with client.stream(…) as reply: async for chunk in reply``.

        ``await client.stream(…)`` gives the reply at its first token; close it when leaving before its end.
        Arguments and errors are those of `complete`.
        """
        return Opening(self, prompt, options)

    async def plan(
        self,
        prompt: str | Message | Sequence[Message | Mapping[str, Any]],
        *,
        after: Sequence[Plan] = (),
        **options: Any,
    ) -> Plan:
        """What a call would take and come to; nothing is sent, held, stored or waited for. See `llmkit.Plan`.

        Args:
            prompt, options: as for `complete`.
            after: plans of calls that will be made before: what they cost counts as spent, their answers as stored.

        Raises:
            ConfigError: the call could not be made at all. That it would be refused is in ``plan.refusal``.
            StoreError: the accounts of the budgets cannot be read.
        """
        from llmkit.planner import Planner, replayed

        asked = (await _checked(options)).unheard()
        if self._tape is not None and self._tape.replays:
            plan = replayed(self._tape, await self._unrouted(prompt, False, asked, self._tape))
            if plan is not None:
                return plan
        call = await self._asked_call(prompt, False, asked)
        planner = Planner(
            self._pipeline.layers,
            breakers=self.circuits,
            ledger=self.ledger,
            provider=self._provider,
            clock=self.clock,
            attempts=self.config.retry.attempts,
        )
        return await planner.plan(call, after)

    def for_plans(self, config: Config | None = None) -> AsyncClient:
        """A client to plan with: the same ledger, cache and circuits, and limits of its own that may be changed.

        ``config`` in the place of this one's. It is not closed.
        """
        twin = copy.copy(self)
        twin.config = config or self.config
        twin._templates = {}
        twin._budgets = Budgets(twin.config.budget)
        layers = [
            Budget(self.clock, twin._budgets, self.ledger) if isinstance(layer, Budget) else layer
            for layer in self._pipeline.layers
        ]
        twin._pipeline = Pipeline(layers, self._provider)
        return twin

    async def _open(self, prompt: Any, *, stream: bool, options: dict[str, Any]) -> Reply:
        asked, started, taping = await _checked(options), self.clock.now(), self.taping
        if taping is None:
            waiting = self._sent(await self._asked_call(prompt, stream, asked))
        else:
            call = await self._unrouted(prompt, stream, asked, taping)
            waiting = taping(call, functools.partial(self._routed, asked, taping))
        try:
            reply = await waiting
        except LLMKitError as error:
            if error.latency_s is None:
                error.latency_s = self.clock.now() - started
            raise
        if stream:
            self._arriving.add(reply)
        return reply

    def _sent(self, call: Call) -> Awaitable[Reply]:
        waiting = self._pipeline(call)
        return (
            settled(waiting, functools.partial(self._alerts.settled, call)) if self._alerts.are_heard(call) else waiting
        )

    async def _unrouted(self, prompt: Any, stream: bool, asked: Options, taping: Recordist | Replay) -> Call:
        """A call that is recorded or replayed: where it goes is looked up when it goes, so that its errors are, too."""
        if not taping.replays:
            if asked.model is None and asked.tier is None and self._model is None:
                await asyncio.to_thread(self.default_model)
            taping.default = self._model
        model = f"tier:{asked.tier}" if asked.tier is not None else asked.model or self.default_model()
        return self._call(prompt, stream, asked, self._common_to(model, ()))

    async def _routed(self, asked: Options, taping: Recordist | Replay, call: Call) -> Reply:
        model = self._model_of(asked)
        if taping.replays and model == taping.default:
            model = await asyncio.to_thread(self._default_here, model)
        try:
            return await self._sent(call.to(model=model, route=self.config.route(model)))
        except LLMKitError as error:
            error.latency_s = self.clock.now() - call.started
            raise

    def _default_here(self, recorded: str) -> str:
        """The default model of a recording where it can be asked here, else that of this machine."""
        try:
            self.config.route(recorded)
        except ConfigError:
            return self.config.default_model().model
        return recorded

    async def _asked_call(self, prompt: Any, stream: bool, asked: Options) -> Call:
        if asked.model is None and asked.tier is None and self._model is None:
            await asyncio.to_thread(self.default_model)  # it may look for local servers
        return self._call(prompt, stream, asked)

    def _call(self, prompt: Any, stream: bool, options: Options, common: Call | None = None) -> Call:
        if common is None:
            common = self._common(self._model_of(options))
        started = self.clock.now()
        asked: dict[str, Any] = {
            "request_id": options.request_id or new_request_id(self.clock),
            "messages": options.messages(prompt),
            "stream": stream,
            "started": started,
            "started_at": self.clock.time(),
            "trail": Trail(options.on_event),
        }
        if options.are_given:
            asked.update(self._asked(options))
        total = asked.get("timeouts", common.timeouts).total
        asked["deadline"] = None if total is None else started + total
        return common.with_(asked)

    def _model_of(self, options: Options) -> str:
        """The model that is asked for, by its name or by a tier.

        Raises:
            ConfigError: the tier is not set.
        """
        if options.tier is not None:
            return self.config.tier(options.tier)
        return options.model or self.default_model()

    def _common(self, model: str) -> Call:
        """What all calls to ``model`` have in common."""
        common = self._templates.get(model)
        if common is None:
            common = self._common_to(model, self.config.route(model))
            if len(self._templates) < _MOST_TEMPLATES:
                self._templates[model] = common
        return common

    def _common_to(self, model: str, route: tuple[Link, ...]) -> Call:
        config = self.config
        return Call(
            request_id="",
            messages=(),
            model=model,
            route=route,
            timeouts=config.timeouts,
            started=0.0,
            started_at=0.0,
            max_cost_usd=config.budget.request_usd,
            max_cost_is_default=not config.budget.request_usd_set,
            max_total_tokens=config.budget.request_tokens,
            degraded_text=config.degraded_text,
            namespace=_namespace(config.cache.namespace, None, {}),
        )

    def _asked(self, options: Options) -> dict[str, Any]:
        """What of a call was said with it."""
        tags = dict(options.tags or {})
        asked: dict[str, Any] = {
            "params": options.params(),
            "user": options.user,
            "tags": tags,
            "timeouts": options.timeouts(self.config.timeouts),
            "cache": options.cache or "use",
            "repeat": options.repeat or 0,
            "schema": options.schema,
            "template": None if options.template is None else digest_of(options.template),
            "namespace": _namespace(self.config.cache.namespace, options.user, tags),
        }
        cap = options.max_cost_usd
        return asked if cap is None else {**asked, "max_cost_usd": cap, "max_cost_is_default": False}

    def default_model(self) -> str:
        """The model used where none is named; looked for at the first call, then kept. That of a recording it replays."""
        taping = self.taping
        if taping is not None and taping.replays and taping.default is not None:
            return taping.default
        if self._model is None:
            self._model = self.config.default_model().model
        return self._model

    async def compare(
        self,
        prompt: str | Message | Sequence[Message | Mapping[str, Any]] | None = None,
        *,
        models: str | Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
        prompts: str | Sequence[str] | Mapping[str, Any] | None = None,
        repeat: int = 1,
        concurrency: int = 8,
        **options: Any,
    ) -> pd.DataFrame:
        """Ask over a grid of models, temperatures and prompts at once; a DataFrame of one row an answer.

        Args:
            prompt: as in `complete`; with ``prompts``, what follows each of them.
            models: a list, or a text with commas between. A chain is one text of a list, or an alias.
            prompts: names of kept prompts (`prompts`), ``"summary"`` or ``"summary@2"``; or a dict of name and prompt.
            repeat: so many samples of each, each with an answer of its own in the cache.
            concurrency: how many are asked for at the same time, 1 to 256.
            options: as in `complete`, for every call: ``max_cost`` is what each of them may cost.

        An answer that fails, or that a budget refuses, is a row with its error. The columns are
        `llmkit.comparison.COLUMNS`. Each call is tagged ``prompt=NAME`` where its prompt has a name. Cancelled (or
        interrupted), it closes all connections and settles; the exception then has the rows so far in ``partial``.

        Raises:
            ConfigError: an impossible grid or option, or an unknown model or prompt; then nothing is sent.
            StoreError: kept prompts cannot be read.
        """
        grid = {"models": models, "temperatures": temperatures, "prompts": prompts}
        comparison = await self._comparison(prompt, **grid, repeat=repeat, concurrency=concurrency, **options)
        try:
            await comparison.run(self)
        except asyncio.CancelledError as cancelled:
            cancelled.partial = comparison.frame()  # type: ignore[attr-defined]
            raise
        return comparison.frame()

    async def _comparison(self, prompt: Any, **asked: Any) -> Comparison:
        """What `compare` asks, checked, and not sent yet."""
        from llmkit.comparison import Comparison

        return await Comparison.of(self, prompt, new_id=functools.partial(new_request_id, self.clock), **asked)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The prompts that are kept in this project, under their names; see `llmkit.prompts.Prompts`."""
        from llmkit.prompts import Prompts, project_of

        return Prompts(self.config, self.clock, project_of(self.config))

    def default_is(self, model: str) -> None:
        """Where none is named and none was looked for yet, it is ``model``."""
        if self._model is None:
            self._model = model

    # -- looking -----------------------------------------------------------------------------------------------------

    def calls(self, limit: int | None = None) -> pd.DataFrame:
        """Every call in the ledger as a DataFrame, one row a call, newest last; ``limit`` keeps the newest so many."""
        return self.ledger.frame(limit=limit)

    def attempts(self, request_id: str) -> list[dict[str, Any]]:
        """Every attempt of one call, in order, as the ledger has it."""
        return self.ledger.attempts(request_id)

    def spend(
        self,
        by: str | Sequence[str] = "model",
        since: str | datetime | float | None = None,
        until: str | datetime | float | None = None,
    ) -> pd.DataFrame:
        """What all calls in the ledger have cost, of whatever process, as a DataFrame with one row for each ``by``.

        Args:
            by: ``model``, ``user``, ``tag``, ``hour``, ``day``, ``week``, ``month``, or a list of some of them. Hours and
                days are those of ``[budget] timezone``. A call counts once for each of its tags under ``tag``.
            since, until: ``"7d"`` ago (``"12h"``, ``"30m"`` …), a datetime (a naive one is local time), or epoch
                seconds; both are taken to the quarter of an hour, and a call is where it started.

        The columns are ``by``, then calls, attempts, input_tokens, cached_input_tokens, output_tokens, reasoning_tokens,
        cost_usd, saved_usd (by the cache and by calls that shared an answer), unpriced (attempts of unknown cost) and
        maybe_billed (attempts that nobody saw the end of). Blocks for the time of a query.

        Raises:
            ConfigError: there is no such key, or no such time.
            StoreError: the ledger cannot be read.
        """
        from llmkit import spending

        now = self.clock.time()
        began, ended = spending.moment(since, now), spending.moment(until, now, "until")
        return spending.frame(self.ledger, spending.keys(by), self._budgets.zone, now=now, since=began, until=ended)

    def export(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write the whole ledger to a ``.csv``, ``.jsonl`` or ``.parquet`` file; see `llmkit.export.export`.

        Returns how many calls it holds. The file is its owner's alone (0600). Blocks while it is written.

        Raises:
            ConfigError: another ending; or the file is there already, and ``overwrite`` is not said.
            StoreError: it cannot be written, or the ledger cannot be read.
        """
        from llmkit.export import export

        return export(self.ledger.pages(), path, overwrite=overwrite)

    async def budgets(self) -> pd.DataFrame:
        """Every limit in force and how far it is used; see `llmkit.budgets.Budgets.frame` for the columns.

        Limits of ``*`` are written out for each user, tag or model seen in their window.

        Raises:
            StoreError: the accounts cannot be read.
        """
        return await self._budgets.frame(self.ledger, self.clock.time())

    def set_budgets(self, **tables: Any) -> None:
        """Change limits, from the next attempt on: ``set_budgets(day={"usd": 2}, session={"usd": "off"})``.

        The tables are those of ``[budget]``; what they do not name stays as it is. What has been spent counts.

        Raises:
            ConfigError: a wrong key or value, as in the file; then nothing is changed.
        """
        config = self.config.with_(budget=tables)
        self.config = config
        self._templates = {}
        self._budgets.use(config.budget)

    def breakers(self) -> pd.DataFrame:
        """The circuit of every endpoint used so far, and of those that are not closed in another kernel.

        Columns: endpoint, base_url, state, failures_in_row, retry_after, last_failure.
        """
        import pandas as pd

        columns = ["endpoint", "base_url", "state", "failures_in_row", "retry_after", "last_failure"]
        rows = [
            (c.endpoint.name, c.endpoint.base_url, c.state, c.failures_in_row, c.retry_after, c.last_failure)
            for c in self.circuits
        ]
        return pd.DataFrame(rows, columns=columns)

    # -- recording ---------------------------------------------------------------------------------------------------

    def record(
        self, path: str | os.PathLike[str], *, scrub: bool = False, overwrite: bool = False, new: bool = False
    ) -> None:
        """Record all calls from now on to ``path``, a file of JSON lines, from which `replay` answers them anywhere.

        Keys are taken out of what is written. While ``LLMKIT_REPLAY`` is set nothing is recorded, and this does nothing.

        Args:
            scrub: take personal data out as well: e-mail addresses, telephone, card and account numbers, IP addresses.
            overwrite: begin anew; else calls are added, and a question that is asked again replaces its recorded answer.
            new: record only what is not in the file yet, and answer the rest from it.

        Raises:
            ConfigError: the file cannot be written, holds something else, or another process records to it.
        """
        if overwrite and new:
            raise ConfigError("overwrite begins anew, and new keeps what there is: say one of them")
        if self._is_bound:
            return
        file, before = tape.place(path), self._tape
        if before is not None and not before.replays and before.path == file.resolve():
            self.live()  # the same file from its beginning, so nobody may hold it
        self._turn(tape.recordist(self.config, file, self.clock, scrub=scrub, overwrite=overwrite, new=new))

    def replay(self, path: str | os.PathLike[str], *, live: bool = False) -> None:
        """Answer all calls from now on from ``path``, from its beginning; nothing is sent, and no key is needed.

        Args:
            live: ask for real what was not recorded; else that is a `ReplayMismatch`.

        Raises:
            ConfigError: the file cannot be read, or is no recording.
        """
        file, live = tape.place(path), live and not self._is_bound
        self._turn(tape.replay(self.config, file, self.clock, live=live))

    def live(self) -> None:
        """Neither record nor replay from now on. While ``LLMKIT_REPLAY`` is set this does nothing."""
        if not self._is_bound:
            self._turn(None)

    @property
    def taping(self) -> Recordist | Replay | None:
        """What records or replays the calls of this client; None where they are only asked.

        Where it was told neither, that is what the cells of the notebook are told.
        """
        return self._tape if self._tape is not None else tape.of_notebook()

    @property
    def own_taping(self) -> Recordist | Replay | None:
        """What this client itself was told to record to or to replay."""
        return self._tape

    @property
    def _is_bound(self) -> bool:
        told = tape.told_by(self.config.environ)
        return told is not None and told[0] == tape.REPLAY

    def _turn(self, to: Recordist | Replay | None) -> None:
        before, self._tape = self._tape, to
        if before is not None:
            before.finish()

    # -- closing -----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close connections and the ledger. Replies still arriving are aborted and settled."""
        for reply in list(self._arriving):
            await reply.aclose()
        self._turn(None)
        await self._flights.aclose()
        await self._provider.aclose()
        await self.circuits.aclose()
        await self.cache.aclose()
        if "prompts" in vars(self):
            self.prompts.close()
        self.ledger.close()
        if self._shared is not None:
            await self._shared.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if not hasattr(self, "_model"):  # a traceback shows it while it is being made
            return f"<{type(self).__name__}>"
        return f"<{type(self).__name__} model={self._model or self.config.model or 'not yet chosen'}>"


class Opening:
    """A reply that has yet to begin: await it, or use it as an async context manager."""

    def __init__(self, client: AsyncClient, prompt: Any, options: dict[str, Any]) -> None:
        self._client = client
        self._prompt = prompt
        self._options = options
        self._reply: Reply | None = None

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._client._open(self._prompt, stream=True, options=self._options).__await__()

    async def __aenter__(self) -> Reply:
        self._reply = await self
        return self._reply

    async def __aexit__(self, *_: object) -> None:
        if self._reply is not None:
            await self._reply.aclose()


class Client:
    """`AsyncClient` without ``await``; the arguments are the same. One client serves all threads."""

    def __init__(self, **arguments: Any) -> None:
        self._client = AsyncClient(**arguments)
        _unclosed().add(self)

    @property
    def _portal(self) -> Portal:
        from llmkit import portal

        return portal.shared(self)  # asked for each time: in a forked child it is another one

    @property
    def config(self) -> Config:
        return self._client.config

    def complete(self, prompt: str | Message | Sequence[Message | Mapping[str, Any]], **options: Any) -> Reply:
        """See `AsyncClient.complete`. An interrupt closes the connection, settles, and is raised again."""
        return self._bridged(self._client.complete(prompt, **options))

    def plan(
        self,
        prompt: str | Message | Sequence[Message | Mapping[str, Any]],
        *,
        after: Sequence[Plan] = (),
        **options: Any,
    ) -> Plan:
        """See `AsyncClient.plan`."""
        return self._portal.run(self._client.plan(prompt, after=after, **options))

    def stream(self, prompt: str | Message | Sequence[Message | Mapping[str, Any]], **options: Any) -> Reply:
        """``with client.stream(…) as reply: for chunk in reply: …``; begins at the first token."""
        return self._bridged(_awaited(self._client.stream(prompt, **options)))

    def _bridged(self, asking: Coroutine[Any, Any, Reply]) -> Reply:
        from llmkit.portal import shared

        bridge = self._portal
        reply = bridge.run(asking)
        reply._portal = bridge
        if reply.outcome is None:
            shared(reply)  # it arrives even if its client is dropped
        return reply

    def compare(
        self, prompt: str | Message | Sequence[Message | Mapping[str, Any]] | None = None, **asked: Any
    ) -> pd.DataFrame:
        """See `AsyncClient.compare`. An interrupt closes all connections and settles; its ``partial`` has the rows so far."""
        portal = self._portal
        comparison = portal.run(self._client._comparison(prompt, **asked))
        try:
            portal.run(comparison.run(self._client))
        except KeyboardInterrupt as interrupt:
            interrupt.partial = comparison.frame(portal)  # type: ignore[attr-defined]
            raise
        return comparison.frame(portal)

    @property
    def prompts(self) -> Prompts:
        """See `AsyncClient.prompts`."""
        return self._client.prompts

    def default_model(self) -> str:
        """See `AsyncClient.default_model`."""
        return self._client.default_model()

    def calls(self, limit: int | None = None) -> pd.DataFrame:
        """See `AsyncClient.calls`."""
        return self._client.calls(limit)

    def attempts(self, request_id: str) -> list[dict[str, Any]]:
        """See `AsyncClient.attempts`."""
        return self._client.attempts(request_id)

    def spend(
        self,
        by: str | Sequence[str] = "model",
        since: str | datetime | float | None = None,
        until: str | datetime | float | None = None,
    ) -> pd.DataFrame:
        """See `AsyncClient.spend`."""
        return self._client.spend(by, since, until)

    def export(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """See `AsyncClient.export`."""
        return self._client.export(path, overwrite=overwrite)

    def budgets(self) -> pd.DataFrame:
        """See `AsyncClient.budgets`."""
        return self._portal.run(self._client.budgets())

    def set_budgets(self, **tables: Any) -> None:
        """See `AsyncClient.set_budgets`."""
        self._client.set_budgets(**tables)

    def record(
        self, path: str | os.PathLike[str], *, scrub: bool = False, overwrite: bool = False, new: bool = False
    ) -> None:
        """See `AsyncClient.record`."""
        self._client.record(path, scrub=scrub, overwrite=overwrite, new=new)

    def replay(self, path: str | os.PathLike[str], *, live: bool = False) -> None:
        """See `AsyncClient.replay`."""
        self._client.replay(path, live=live)

    def live(self) -> None:
        """See `AsyncClient.live`."""
        self._client.live()

    def breakers(self) -> pd.DataFrame:
        """See `AsyncClient.breakers`."""
        return self._client.breakers()

    @property
    def circuits(self) -> Breakers:
        """The circuits themselves, to `isolate` or `reset` by hand."""
        return self._client.circuits

    @property
    def cache(self) -> ClientCache:
        """See `AsyncClient.cache`."""
        return ClientCache(self._client.cache, self)

    def close(self) -> None:
        """Close connections and the ledger; replies still arriving are aborted and settled."""
        from llmkit import portal

        self._portal.run(self._client.aclose())
        portal.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        inner = vars(self).get("_client")  # missing while it is being made
        return repr(inner).replace("AsyncClient", "Client", 1) if inner is not None else "<Client>"


class ClientCache:
    """`llmkit.cache.AnswerCache` without ``await``."""

    def __init__(self, cache: AnswerCache, client: Client) -> None:
        self._cache = cache
        self._client = client

    @property
    def enabled(self) -> bool:
        """While it is False, nothing is read and nothing is stored; it may be set."""
        return self._cache.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._cache.enabled = value

    @property
    def hits(self) -> int:
        return self._cache.hits

    @property
    def misses(self) -> int:
        return self._cache.misses

    @property
    def saved_usd(self) -> Decimal:
        """See `AnswerCache.saved_usd`."""
        return self._cache.saved_usd

    @property
    def location(self) -> str:
        """See `AnswerCache.location`."""
        return self._cache.location

    def clear(self, namespace: str | None = None) -> int:
        """See `AnswerCache.clear`."""
        return self._client._portal.run(self._cache.clear(namespace))

    def contents(self, namespace: str | None = None) -> Contents:
        """See `AnswerCache.contents`."""
        return self._client._portal.run(self._cache.contents(namespace))

    def __repr__(self) -> str:
        return repr(self._cache)


def _database(ledger: Ledger) -> Database | None:
    return ledger.database


def _zone(budgets: Budgets) -> tzinfo:
    return budgets.zone


def _spent_since(ledger: Ledger, since: float) -> dict[int, int]:
    spent: dict[int, int] = {}
    for quarter, nanos in ledger.spend(by=("quarter",), sums=("cost_nanos",), since=since):
        spent[quarter] = spent.get(quarter, 0) + nanos
    return spent


def _entries(config: Config, clock: Clock, shared: Shared | None, *, alone: bool) -> Entries:
    """Where answers are kept; waits for files. ``alone``: what this client is answered is nobody else's answer."""
    from llmkit.state.entries import open_entries

    cache = config.cache
    persist = cache.persist and not alone
    if shared is not None and persist:
        return shared.entries(max_bytes=cache.max_bytes)
    url = config.state_url if persist else "memory"
    room = min(cache.max_bytes, cache.memory_bytes) if url == "memory" else cache.max_bytes
    return open_entries(url, max_bytes=room, clock=clock)


def _flights(config: Config, clock: Clock, shared: Shared | None, alone: str, *, is_alone: bool) -> SingleFlight:
    """Which calls are in flight, wherever their answers may be read; ``alone`` names answers that nobody else can read."""
    from llmkit.flight import SingleFlight
    from llmkit.state.flights import FileFlights
    from llmkit.state.store import ledger_path

    if is_alone or not config.cache.persist:
        return SingleFlight(alone, clock)
    if shared is not None:
        return SingleFlight(shared.location, clock, shared.flights)
    path = ledger_path(config.state_url)
    return SingleFlight(alone, clock) if path is None else SingleFlight(str(path), clock, FileFlights(path, clock))


def _namespace(setting: str, user: str | None, tags: Mapping[str, str]) -> str:
    """Whose answers a call shares."""
    if setting == "shared":
        return ""
    if setting == "user":
        return f"user:{user or ''}"
    name = setting.removeprefix("tag:")
    return f"tag:{name}={tags.get(name, '')}"


def new_request_id(clock: Clock) -> str:
    """32 hexadecimal digits: milliseconds, then chance. Ids that grow with time keep a ledger's pages together."""
    return f"{int(clock.time() * 1000) << 80 | _CHANCE.getrandbits(80):032x}"


# Seeded by the system, and apart from the generator that users seed: ids must never repeat. They are no secrets.
_CHANCE = random.Random()  # noqa: S311
_CLIENTS: WeakSet[AsyncClient] = WeakSet()


def _in_child() -> None:
    _CHANCE.seed()
    for client in list(_CLIENTS):
        client._arriving.clear()  # what arrives is the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@functools.cache
def _unclosed() -> WeakSet[Client]:
    """The clients to close when the interpreter ends."""
    from llmkit import portal  # first, so that its own ending comes after this one

    clients: WeakSet[Client] = WeakSet()
    process = os.getpid()

    def close() -> None:
        for client in list(clients) if os.getpid() == process else ():  # in a forked child they are the parent's
            # Python 3.12.0 and 3.12.1 start no thread while they end; a client whose loop does not run has nothing open.
            with suppress(TimeoutError, RuntimeError):
                client._portal.start(client._client.aclose()).result(portal.SETTLE_S)

    atexit.register(close)
    return clients


async def _checked(options: dict[str, Any]) -> Options:
    if options.get("images") is None:
        return Options.of(options)
    return await asyncio.to_thread(Options.of, options)  # it reads files


async def _awaited(opening: Opening) -> Reply:
    return await opening
