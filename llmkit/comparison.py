"""One question over a grid: models × temperatures × versions of the prompt × repeats, asked at once, kept side by side.

Each answer is a call of its own and goes down the whole chain: cache, budgets, retries, circuits. One that fails is a row
that says so; the others go on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from llmkit.call import messages_from
from llmkit.errors import ConfigError, LLMKitError
from llmkit.events import AttemptEnded, AttemptStarted, Event
from llmkit.options import Options
from llmkit.prompts import TAG
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from decimal import Decimal

    import pandas as pd

    from llmkit.call import Attempt, Message
    from llmkit.client import AsyncClient
    from llmkit.clock import Clock
    from llmkit.portal import Portal
    from llmkit.prompts import Prompts
    from llmkit.reply import Reply

__all__ = ["AT_ONCE", "COLUMNS", "MOST", "Comparison", "Trial", "Version", "as_models", "joined", "versions_of"]

AT_ONCE = 8
"""How many answers of one comparison are asked for at the same time, where nothing else is said."""
MOST = 256
"""Answers that one comparison has at most."""

COLUMNS = {
    "model": "object",
    "answered": "object",
    "temperature": "float64",
    "prompt": "object",
    "repeat": "int64",
    "text": "object",
    "status": "object",
    "error": "object",
    "input_tokens": "Int64",
    "output_tokens": "Int64",
    "cost_usd": "float64",
    "latency_s": "float64",
    "time_to_first_token_s": "float64",
    "source": "object",
    "request_id": "object",
    "reply": "object",
}


@dataclass(frozen=True, slots=True)
class Version:
    """One prompt of a grid.

    Attributes:
        name: what the column says, and the tag; empty where there is only one prompt and it has no name.
        prompt: what is asked. system: its own system prompt; None: that of the options.
        options: what goes with this prompt alone.
    """

    name: str
    prompt: str | Sequence[Message | Mapping[str, Any]]
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Trial:
    """One answer of a grid.

    Attributes:
        number: its place, from 0. model, temperature, version, repeat: where it stands in the grid; ``repeat`` from 0.
        status: ``waiting``, ``answering``; then ``complete``, ``failed``, ``aborted``, or ``not asked``.
        reply: what there is of an answer. error: why it failed.
        attempts: those that have ended. sent: whether one was made at all.
        latency_s: seconds until it was settled, its wait for a place among those asked at once not counted.
    """

    number: int
    model: str
    temperature: float | None
    version: Version
    repeat: int
    options: dict[str, Any]
    status: str = "waiting"
    reply: Reply | None = None
    error: Exception | None = None
    attempts: list[Attempt] = field(default_factory=list)
    sent: bool = False
    latency_s: float | None = None

    @property
    def text(self) -> str:
        return "" if self.reply is None else self.reply.text

    @property
    def cost_usd(self) -> Decimal | None:
        """USD of all attempts; None where the price of one is unknown, or where nothing has ended yet."""
        if self.reply is not None and self.reply.outcome is not None:
            return self.reply.cost_usd
        costs = [attempt.cost_usd for attempt in self.attempts]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return None
        from decimal import Decimal

        return None if self.sent and not costs else sum(known, Decimal(0))

    @property
    def maybe_billed(self) -> bool:
        """Whether an attempt may be billed for more than was seen."""
        return any(attempt.maybe_billed for attempt in self.attempts)

    @property
    def reason(self) -> str | None:
        """Why there is no whole answer, on one line; None where there is one."""
        if self.error is None:
            return None
        return f"{type(self.error).__name__}: {tidy(str(self.error))}"

    @property
    def request_id(self) -> str:
        if self.reply is not None:  # one that is replayed has the id that it had
            return self.reply.request_id
        given: str = getattr(self.error, "request_id", None) or self.options["request_id"]
        return given

    def hear(self, news: object) -> None:
        """Take in an event of its call."""
        if isinstance(news, AttemptStarted):
            self.sent = True
        elif isinstance(news, AttemptEnded):
            self.attempts.append(news.attempt)

    def row(self) -> tuple[Any, ...]:
        """In the order of `COLUMNS`."""
        reply, usage = self.reply, None if self.reply is None else self.reply.usage
        cost = self.cost_usd
        return (
            self.model,
            None if reply is None else reply.model,
            self.temperature,
            self.version.name or None,
            self.repeat,
            self.text or None,
            self.status,
            self.reason,
            None if usage is None else usage.input_tokens,
            None if usage is None else usage.output_tokens,
            None if cost is None else float(cost),
            self.latency_s if reply is None or reply.latency_s is None else reply.latency_s,
            None if reply is None else reply.time_to_first_token_s,
            None if reply is None else reply.source,
            self.request_id,
            reply,
        )


class Comparison:
    """The trials of a grid; made and checked before anything is sent, run once.

    Args:
        versions: the prompts. models, temperatures: the other two sides; None is what ``options`` or the settings say.
        repeat: so many samples of each.
        options: of every call; see `llmkit.options.Options`.
        new_id: makes the id of a call.
        at_once: how many are asked for at the same time.
        stream: whether the wire is asked to stream.

    Raises:
        ConfigError: an empty or too large grid, something twice on one side, or an impossible option.
        TypeError, ValueError: a prompt that is none.
    """

    def __init__(
        self,
        versions: Sequence[Version],
        *,
        models: Sequence[str | None],
        temperatures: Sequence[float | None],
        repeat: int,
        options: Mapping[str, Any],
        new_id: Callable[[], str],
        at_once: int = AT_ONCE,
        stream: bool = True,
    ) -> None:
        _check(versions, models, temperatures, repeat, at_once, options)
        for version in versions:
            messages_from(version.prompt, version.system)
        grid = product(models, temperatures, versions, range(repeat))
        self.trials = [
            _trial(number, *place, options=options, request_id=new_id()) for number, place in enumerate(grid)
        ]
        self._at_once = at_once
        self._stream = stream

    @classmethod
    async def of(
        cls,
        client: AsyncClient,
        prompt: Any,
        *,
        models: str | Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
        prompts: Any = None,
        repeat: int = 1,
        concurrency: int = AT_ONCE,
        stream: bool = True,
        new_id: Callable[[], str],
        **options: Any,
    ) -> Self:
        """What `llmkit.AsyncClient.compare` asks of ``client``, checked; nothing is sent.

        Raises:
            ConfigError: an impossible grid or option, or an unknown model or prompt.
            StoreError: kept prompts cannot be read.
        """
        versions = versions_of(prompt, prompts, client.prompts)
        wanted = as_models(models)
        if wanted == [None] and options.get("model") is None and options.get("tier") is None:
            wanted = [await asyncio.to_thread(client.default_model)]
        comparison = cls(
            versions,
            models=wanted,
            temperatures=[None] if temperatures is None else _as_list(temperatures),
            repeat=repeat,
            options=options,
            new_id=new_id,
            at_once=concurrency,
            stream=stream,
        )
        comparison.check(client)
        return comparison

    def check(self, client: AsyncClient) -> None:
        """That there are such models. Raises `ConfigError`: one of them cannot be asked."""
        if client.taping is not None and client.taping.replays:  # what is replayed needs no model that is known here
            return
        for model in {trial.options["model"]: None for trial in self.trials if trial.options.get("model")}:
            client.config.route(model)

    async def run(self, client: AsyncClient, hear: Callable[[Trial, object], object] | None = None) -> None:
        """Ask for all of them, and wait until each has ended; whether well or not, its trial says.

        Cancelled, it closes all connections, books what was spent, and is then cancelled; what had arrived is kept.

        Args:
            hear: told, on the loop's thread: a `Trial` and an event of its call, its `Reply` at the first token, or None
                at its end. Must not block.
        """
        places = asyncio.Semaphore(self._at_once)
        tell = hear or _unheard
        ask = client.stream if self._stream else client.complete
        try:
            async with asyncio.TaskGroup() as group:
                for trial in self.trials:
                    group.create_task(_asked(trial, ask, client.clock, places, tell))
        finally:
            for trial in self.trials:  # a task that is cancelled before it began never runs
                if trial.status == "waiting":
                    trial.status = "not asked"

    def frame(self, portal: Portal | None = None) -> pd.DataFrame:
        """One row a trial, in the order of the grid; the columns are `COLUMNS`. ``portal`` lets the replies be read."""
        import pandas as pd

        for reply in self.replies():
            reply._portal = portal
        rows = [trial.row() for trial in self.trials]
        columns = {
            name: pd.Series([row[at] for row in rows], dtype=kind) for at, (name, kind) in enumerate(COLUMNS.items())
        }
        return pd.DataFrame(columns)

    def replies(self) -> list[Reply]:
        """What there is of answers, in the order of the grid."""
        return [trial.reply for trial in self.trials if trial.reply is not None]


def _as_list(temperatures: Any) -> list[Any]:
    return list(temperatures) if isinstance(temperatures, list | tuple) else [temperatures]


def as_models(models: str | Sequence[str] | None) -> list[str | None]:
    """The models of a grid; of a text, those with commas between. A chain stands in a list, or behind an alias."""
    if models is None:
        return [None]
    if isinstance(models, str):
        return [model.strip() for model in models.split(",")]
    return list(models)


def joined(kept: str, prompt: str) -> str:
    """A kept prompt and what follows it."""
    return "\n\n".join(part for part in (kept.strip("\n").rstrip(), prompt) if part.strip())


def versions_of(prompt: Any, prompts: Any, kept: Prompts) -> list[Version]:
    """The prompts of a grid, as `llmkit.Client.compare` takes them.

    Raises:
        ConfigError: none, an unknown one, one that has still to be filled in, or one that cannot go before ``prompt``.
        StoreError: kept prompts cannot be read.
    """
    if prompts is None:
        if prompt is None:
            raise ConfigError("there is nothing to ask", next_step="give a prompt, or prompts=[…]")
        return [Version("", prompt)]
    if isinstance(prompts, str):
        prompts = [name.strip() for name in prompts.split(",")]
    if not hasattr(prompts, "keys"):
        return [_kept_version(name, prompt, kept) for name in prompts]
    if prompt is None:
        return [Version(str(name), text) for name, text in prompts.items()]
    if not isinstance(prompt, str) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError("a prompt can follow others only where all are text")
    return [Version(str(name), joined(text, prompt)) for name, text in prompts.items()]


def _kept_version(name: str, prompt: Any, kept: Prompts) -> Version:
    found = kept.get(name)
    if not found.raw and any(mark in text for text in (found.text, found.system or "") for mark in ("{{", "{%")):
        step = f'fill it in first: prompts={{"{found.reference}": text}}; %%llm_compare --with {name} does it by itself'
        raise ConfigError(f"the prompt {found.reference} is a template", next_step=step)
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError("what follows a kept prompt is text")
    return Version(found.reference, joined(found.text, prompt or ""), found.system)


def _check(
    versions: Sequence[Version],
    models: Sequence[str | None],
    temperatures: Sequence[float | None],
    repeat: object,
    at_once: object,
    options: Mapping[str, Any],
) -> None:
    for what, number in (("repeat", repeat), ("concurrency", at_once)):
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST:
            raise ConfigError(f"{what} is a whole number from 1 to {MOST}, not {number!r:.60}")
    if wrong := {"request_id", "on_event"} & set(options):
        raise ConfigError(f"{min(wrong)} belongs to one call, and a comparison makes several")
    sides = {"model": models, "temperature": temperatures, "prompt": [version.name for version in versions]}
    for what, side in sides.items():
        if not side or "" in side[1:] or (what == "model" and "" in side):
            raise ConfigError(f"a comparison needs a {what}; one of those given is empty")
        twice = next((each for at, each in enumerate(side) if each in side[:at]), None)
        if twice is not None:
            raise ConfigError(f"the {what} {twice!s:.60} stands there twice", next_step="--repeat 2 asks twice")
    assert isinstance(repeat, int)
    number = len(models) * len(temperatures) * len(versions) * repeat
    if number > MOST:
        raise ConfigError(f"this comparison would have {number:,} answers; {MOST} is the most", next_step="ask less")


def _trial(
    number: int,
    model: str | None,
    temperature: float | None,
    version: Version,
    repeat: int,
    *,
    options: Mapping[str, Any],
    request_id: str,
) -> Trial:
    own: dict[str, Any] = dict(options) | dict(version.options) | {"repeat": repeat, "request_id": request_id}
    if model is not None:
        own["model"] = model
        own.pop("tier", None)
    if temperature is not None:
        own["temperature"] = temperature
    if version.system is not None:
        own["system"] = version.system
    if version.name:
        tags = dict(own.get("tags") or {})
        if tags.get(TAG, version.name) != version.name:
            step = "choose another key for your own"
            raise ConfigError(f"the tag {TAG} says which version of the prompt was asked", next_step=step)
        own["tags"] = tags | {TAG: version.name}
    Options.of(own)
    return Trial(number, own.get("model") or own.get("tier") or "", own.get("temperature"), version, repeat, own)


async def _asked(
    trial: Trial,
    ask: Callable[..., Awaitable[Reply]],
    clock: Clock,
    places: asyncio.Semaphore,
    tell: Callable[[Trial, object], object],
) -> None:
    """Ask for one, and see it settled; nothing that goes wrong with it leaves it, but its cancellation."""

    def heard(event: Event) -> None:
        trial.hear(event)
        tell(trial, event)

    began: float | None = None
    try:
        async with places:
            began = clock.now()
            trial.status = "answering"
            tell(trial, None)
            trial.reply = await ask(trial.version.prompt, on_event=heard, **trial.options)
            tell(trial, trial.reply)
            await trial.reply.read()
        trial.status = "complete" if trial.reply.outcome and trial.reply.outcome.status == "complete" else "aborted"
    except asyncio.CancelledError:
        trial.status = "aborted" if trial.sent else "not asked"
        raise
    except Exception as error:  # noqa: BLE001 - a row that says so; the others go on
        trial.status, trial.error = "failed", error
        if isinstance(error, LLMKitError) and error.reply is not None:
            trial.reply = error.reply
    finally:
        if began is not None:
            failed_s = getattr(trial.error, "latency_s", None)
            trial.latency_s = clock.now() - began if failed_s is None else failed_s
        tell(trial, None)


def _unheard(trial: Trial, news: object) -> None:
    pass
