"""What goes in: a call, its messages, its settings, and the trail of what happened to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from llmkit.account import Hold
    from llmkit.endpoint import Endpoint, Link
    from llmkit.events import Event
    from llmkit.reply import Usage
    from llmkit.schema import Schema

__all__ = [
    "CACHE_MODES",
    "TIERS",
    "Attempt",
    "Call",
    "Message",
    "Params",
    "Skipped",
    "Timeouts",
    "Trail",
    "digest_of",
    "messages_from",
]

_new, _set = object.__new__, object.__setattr__

CACHE_MODES = ("use", "refresh", "off", "only")
TIERS = ("simple", "medium", "hard")
_SHOWN = 200  # characters of a message in its repr


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``content`` is text, or a list of content parts as OpenAI's format has them."""

    role: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The text of the message; parts that are not text are left out."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")

    def __repr__(self) -> str:
        """Short, and without the data of a picture."""
        if isinstance(self.content, str):
            return f"Message({self.role!r}, {_short(self.content)})"
        return f"Message({self.role!r}, [{', '.join(_in_short(part) for part in self.content)}])"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")


def _in_short(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _short(part["text"])
    return f"<{kind or type(part).__name__!s:.40}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """What shapes the answer. None means: not sent, so the provider's own default holds.

    Attributes:
        max_tokens: most output tokens, reasoning included.
        extra: further fields of the request body, passed on as they are.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Time limits in seconds; None means no limit of that kind.

    Attributes:
        connect: until the connection stands.
        first_token: from sending one attempt until its first token. A reply that is not streamed arrives whole, so
            for it this limit holds only where the user set it (``first_token_set``).
        idle: between two chunks.
        total: the whole call, all attempts and waits included.
    """

    connect: float | None = 5.0
    first_token: float | None = 30.0
    idle: float | None = 30.0
    total: float | None = 120.0
    first_token_set: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request that was sent, or was about to be.

    Attributes:
        number: 1-based, over all links of the call.
        status: ``complete``, ``aborted`` or ``failed``.
        started: epoch seconds.
        latency_s, time_to_first_token_s: seconds from the attempt's own start; None where it never came to that.
        cost_usd: None where the price is unknown.
        error: the class name of the error; None where there was none.
        maybe_billed: the request was sent and its end was never seen.
    """

    number: int
    provider: str
    model: str
    status: str
    started: float
    latency_s: float
    time_to_first_token_s: float | None = None
    usage: Usage | None = None
    cost_usd: Decimal | None = None
    error: str | None = None
    message: str | None = None
    http_status: int | None = None
    provider_request_id: str | None = None
    finish_reason: str | None = None
    maybe_billed: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A link that was not used, or was left, and why."""

    endpoint: str
    reason: str


@dataclass(slots=True)
class Trail:
    """What happened to one call, in order. The only thing of a call that changes.

    ``listener`` hears every event of this call, on the event loop's thread. ``saved``: USD that a stored or shared
    answer would have cost. ``warnings``: what the caller should know although nothing failed, in sentences.
    ``sent``: whether the attempt under way has gone out, False between attempts; None where nobody notes it.
    ``asked``: tells the first request of this call from a different one, in this process only.
    ``repairs``: how often the answer was asked for again because it did not fit its schema.
    """

    listener: Callable[[Event], object] | None = None
    attempts: list[Attempt] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    waited_s: float = 0.0
    attempts_begun: int = 0
    saved: Decimal | None = None
    warnings: list[str] = field(default_factory=list)
    sent: bool | None = None
    asked: int | None = None
    repairs: int = 0

    @property
    def spent(self) -> Decimal | None:
        """USD of all ended attempts; None where the price of one of them is unknown."""
        total = Decimal(0)
        for attempt in self.attempts:
            if attempt.cost_usd is None:
                return None
            total += attempt.cost_usd
        return total

    @property
    def tokens(self) -> int:
        """Input and output tokens of all ended attempts."""
        return sum(a.usage.input_tokens + a.usage.output_tokens for a in self.attempts if a.usage is not None)


@dataclass(frozen=True, kw_only=True)  # no slots: a copy is one dict, which costs a quarter of as many slots
class Call:
    """One question on its way down the chain. Layers hand on a changed copy (`to`), never change it.

    Attributes:
        request_id: unique; the key of the call in the ledger.
        model: as it was asked for, alias or ``provider:model``.
        route: the links it may take, in order.
        link: the one chosen by the route layer; None above it.
        stream: whether the wire is asked to stream.
        started, deadline: on `Clock.now`'s scale; deadline None means none.
        started_at: epoch seconds.
        max_cost_usd, max_total_tokens: the cap of this one request, all attempts together.
        max_cost_is_default: nobody asked for ``max_cost_usd``: it is the one that is on without asking.
        degraded_text: what to answer when every link is out.
        cache: ``use``, ``refresh`` (ask anew and store), ``off`` (neither read nor store) or ``only`` (never ask).
        repeat: which sample of the answer is wanted: each number has an answer of its own.
        namespace: whose answers may be shared with this call; "" everybody's.
        schema: the shape that the answer must have; None: any.
        template: the digest of the text that the prompt was made from; None where none was named.
        request_key: what identical requests have in common, set by the cache layer; None above it and where it is off.
        hold: what is set aside for the next attempt, set by the budget layer; None where nothing is.
        on_send: to be called when the connection stands, right before the request goes out; its awaitable, if it gives
            one, is waited for. Set by the meter.
    """

    request_id: str
    messages: tuple[Message, ...]
    model: str
    route: tuple[Link, ...]
    started: float
    started_at: float
    params: Params = Params()
    stream: bool = False
    user: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    timeouts: Timeouts = Timeouts()
    deadline: float | None = None
    max_cost_usd: Decimal | None = None
    max_cost_is_default: bool = False
    max_total_tokens: int | None = None
    degraded_text: str | None = None
    cache: str = "use"
    repeat: int = 0
    namespace: str = ""
    schema: Schema | None = None
    template: str | None = None
    request_key: str | None = None
    link: Link | None = None
    hold: Hold | None = None
    on_send: Callable[[], Awaitable[None] | None] | None = None
    trail: Trail = field(default_factory=Trail)

    def to(self, **changes: Any) -> Call:
        """A copy with these fields changed; the trail is shared."""
        return self.with_(changes)

    def with_(self, changes: Mapping[str, Any]) -> Call:
        """`to`, of a mapping."""
        fields = {**self.__dict__, **changes}
        if len(fields) != len(self.__dict__):
            raise TypeError(f"a call has no {', '.join(changes.keys() - self.__dict__.keys())}")
        twin = _new(Call)
        _set(twin, "__dict__", fields)
        return twin

    async def sends(self) -> None:
        """The connection stands, and the request goes out now: say so to whoever must know, and wait until it may.

        Raises:
            LLMKitError: it may not, so nothing is sent.
        """
        if self.on_send is not None:
            waiting = self.on_send()
            if waiting is not None:
                await waiting
        self.trail.sent = True

    @property
    def said(self) -> tuple[Message, ...]:
        """The messages, with the schema as the instruction that it comes to: for estimates of what goes in."""
        return self.messages if self.schema is None else self.schema.instructed(self.messages)

    @property
    def beside(self) -> Mapping[str, Any]:
        """What the model may read beside the messages: for bounds of what goes in."""
        extra = self.params.extra
        return extra if self.schema is None else {**extra, "schema": self.schema.bound}

    @property
    def endpoint(self) -> Endpoint:
        """The chosen endpoint. Only layers below the route may ask."""
        if self.link is None:
            raise RuntimeError("no link has been chosen yet: this layer stands above the route")
        return self.link.endpoint


def digest_of(template: str) -> str:
    """What stands in a ledger for the text that prompts are made from: nothing of it, and always the same."""
    from hashlib import sha256

    return sha256(template.strip().encode("utf-8", "surrogatepass")).hexdigest()[:32]


def messages_from(
    prompt: str | Message | Sequence[Message | Mapping[str, Any]], system: str | None = None
) -> tuple[Message, ...]:
    """Accept what users pass: a string, a `Message`, or a list of messages or ``{"role", "content"}``.

    Raises:
        TypeError, ValueError: on anything else, naming what is wrong.
    """
    if isinstance(prompt, str):
        user = Message("user", prompt)
        return (user,) if system is None else (Message("system", system), user)
    if isinstance(prompt, Message):
        prompt = [prompt]
    messages = [] if system is None else [Message("system", system)]
    for index, item in enumerate(prompt):
        if isinstance(item, Message):
            messages.append(item)
            continue
        if not hasattr(item, "keys"):
            raise TypeError(
                f"message {index} is a {type(item).__name__}, not a Message or a dict with role and content"
            )
        if missing := {"role", "content"} - set(item.keys()):
            raise ValueError(f"message {index} lacks {' and '.join(sorted(missing))}")
        content = item["content"]
        if not isinstance(content, str | list):
            raise TypeError(f"message {index}: content is a {type(content).__name__}, not text or a list of parts")
        messages.append(Message(str(item["role"]), content))
    if not any(m.role != "system" for m in messages):
        raise ValueError("there is no message to send")
    return tuple(messages)
