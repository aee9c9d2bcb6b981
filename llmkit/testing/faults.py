"""What can go wrong, as data, and the script that says which request it happens to."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FRAMINGS", "NO_FAULT", "USAGES", "Fault", "Script"]

RetryForm = Literal["seconds", "date", "ms"]
Usages = Literal["right", "none", "null", "zero", "negative", "text", "huge", "with_choices", "each_chunk"]
Framing = Literal["halves", "bytes", "crlf", "comments", "no_space", "extra_fields", "glued"]

USAGES: tuple[str, ...] = get_args(Usages)
FRAMINGS: tuple[str, ...] = get_args(Framing)
FOREVER = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong with one request. Make it with one of the constructors below.

    Tokens of the answer are counted from its first one; ``after=3`` means: when three have been sent. Where the
    request is not streamed, ``after`` is where in the body it happens (roughly): 0 is its very beginning.
    """

    kind: str
    http_status: int | None = None
    retry_after: float | None = None
    retry_form: RetryForm = "seconds"
    should_retry: bool | None = None
    message: str | None = None
    after: int = 0
    seconds: float = 0.0
    token_delay_s: float = 0.0
    size: int = 0
    variants: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = [
            f"{item.name}={value!r}" for item in fields(self)[1:] if (value := getattr(self, item.name)) != item.default
        ]
        return f"Fault.{self.kind}({', '.join(shown)})"

    # -- an error instead of an answer -------------------------------------------------------------------------------

    @classmethod
    def status(
        cls,
        status: int,
        *,
        retry_after: float | None = None,
        retry_form: RetryForm = "seconds",
        should_retry: bool | None = None,
        message: str | None = None,
    ) -> Fault:
        """An HTTP error in the wire's own shape.

        Args:
            status: 400 to 599.
            retry_after: seconds; None sends no header.
            retry_form: how it is said: ``Retry-After`` in seconds or as a date, or ``retry-after-ms``.
            should_retry: sent as ``x-should-retry``; None sends no header.
            message: the error's text instead of a fitting one.
        """
        if not 400 <= status <= 599:
            raise ValueError(f"status is an HTTP error, 400 to 599, not {status}")
        if retry_form not in get_args(RetryForm):
            raise ValueError(f"retry_form is one of {', '.join(get_args(RetryForm))}, not {retry_form!r}")
        return cls(
            kind="status",
            http_status=status,
            retry_after=retry_after,
            retry_form=retry_form,
            should_retry=should_retry,
            message=message,
        )

    @classmethod
    def quota(cls) -> Fault:
        """No credit left: OpenAI's 429 ``insufficient_quota``, Anthropic's 400 "credit balance is too low"."""
        return cls(kind="quota")

    @classmethod
    def auth(cls, status: int = 401) -> Fault:
        """The key is refused, and the error's text repeats it in full: a hostile server does that."""
        return cls(kind="auth", http_status=status)

    @classmethod
    def context_too_long(cls) -> Fault:
        """The prompt does not fit the window: a 400 in the words of each provider."""
        return cls(kind="context_too_long")

    @classmethod
    def model_not_found(cls) -> Fault:
        """A 404 for the model."""
        return cls(kind="model_not_found")

    # -- not an answer at all ----------------------------------------------------------------------------------------

    @classmethod
    def html(cls, status: int = 502) -> Fault:
        """A web page, as proxies and captive portals send it; with 200 it even claims success."""
        return cls(kind="html", http_status=status)

    @classmethod
    def garbage(cls) -> Fault:
        """200, and bytes that are no JSON, no text and no event stream."""
        return cls(kind="garbage")

    @classmethod
    def empty(cls) -> Fault:
        """200, and a body of no bytes."""
        return cls(kind="empty")

    @classmethod
    def huge(cls, size: int = 100_000_000) -> Fault:
        """A body of that many bytes where a kilobyte was due: one JSON string, or one event, made while it is read."""
        return cls(kind="huge", size=size)

    @classmethod
    def endless(cls, token_delay_s: float = 0.0) -> Fault:
        """A body that never ends: a stream goes on and on with good tokens, a JSON string is never closed."""
        return cls(kind="endless", token_delay_s=token_delay_s)

    # -- the connection ----------------------------------------------------------------------------------------------

    @classmethod
    def refused(cls) -> Fault:
        """No connection. Over a socket the connection stands already, so there it is a reset."""
        return cls(kind="refused")

    @classmethod
    def reset(cls) -> Fault:
        """The connection is reset before the response begins."""
        return cls(kind="reset")

    @classmethod
    def hang(cls, seconds: float = FOREVER) -> Fault:
        """The request is accepted and nothing comes back for that long; then the right answer does."""
        return cls(kind="hang", seconds=seconds)

    @classmethod
    def stall(cls, after: int = 3, seconds: float = FOREVER) -> Fault:
        """Silence in the middle for that long; then the rest comes."""
        return cls(kind="stall", after=after, seconds=seconds)

    @classmethod
    def slow(cls, latency_s: float = 5.0, token_delay_s: float = 0.5) -> Fault:
        """The right answer, late: that long before it begins, and that long before each further token."""
        return cls(kind="slow", seconds=latency_s, token_delay_s=token_delay_s)

    @classmethod
    def cut(cls, after: int = 3) -> Fault:
        """The connection is closed in the middle, without the end that HTTP demands."""
        return cls(kind="cut", after=after)

    # -- inside the answer -------------------------------------------------------------------------------------------

    @classmethod
    def no_done(cls) -> Fault:
        """All tokens arrive, but not ``[DONE]`` (``message_stop``): HTTP ends well, the stream does not say so."""
        return cls(kind="no_done")

    @classmethod
    def garbage_frame(cls, after: int = 3) -> Fault:
        """An event that is no JSON in the middle of the stream, then its end."""
        return cls(kind="garbage_frame", after=after)

    @classmethod
    def error_in_stream(
        cls, after: int = 3, *, message: str = "The server had an error while processing your request."
    ) -> Fault:
        """An error object inside a stream that began with 200."""
        return cls(kind="error_in_stream", after=after, message=message)

    @classmethod
    def usage(cls, variant: Usages) -> Fault:
        """A right answer whose usage is missing, nonsense, or said in an unusual place (see `USAGES`)."""
        return cls(kind="usage", variants=(_known(variant, USAGES, "usage"),))

    @classmethod
    def framing(cls, *variants: Framing) -> Fault:
        """A right answer, cut up or dressed up as servers and proxies do it (see `FRAMINGS`)."""
        if not variants:
            raise ValueError(f"framing takes at least one of {', '.join(FRAMINGS)}")
        return cls(kind="framing", variants=tuple(_known(variant, FRAMINGS, "framing") for variant in variants))

    @classmethod
    def refusal(cls) -> Fault:
        """The model declines: OpenAI's ``refusal`` field, Anthropic's stop reason ``refusal``."""
        return cls(kind="refusal")

    @classmethod
    def content_filter(cls, after: int = 3) -> Fault:
        """The provider's filter ends the answer after so many tokens."""
        return cls(kind="content_filter", after=after)

    @classmethod
    def reasoning_only(cls) -> Fault:
        """The whole limit goes into reasoning: billed, ended by ``length``, without a word of answer."""
        return cls(kind="reasoning_only")


NO_FAULT = Fault(kind="none")
"""What happens to a request that nothing happens to."""


def _known(variant: str, variants: tuple[str, ...], what: str) -> str:
    if variant not in variants:
        raise ValueError(f"{what} is one of {', '.join(variants)}, not {variant!r}")
    return variant


class Script:
    """Which request fails, and how: first what was ordered for the next calls, then chance."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Fault, int | None]] = deque()
        self._rate = 0.0
        self._faults: tuple[Fault, ...] = ()
        self._random = random.Random(0)

    def order(self, fault: Fault, times: int | None) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times is at least 1, or None for every call from now on, not {times}")
        self._queue.append((fault, times))

    def chance(self, rate: float, faults: Sequence[Fault], seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is a share of the calls, 0 to 1, not {rate}")
        if not faults:
            raise ValueError("fail_rate needs at least one fault to choose from")
        self._rate, self._faults, self._random = rate, tuple(faults), random.Random(seed)

    def clear(self) -> None:
        self._queue.clear()
        self._rate = 0.0

    def next(self) -> Fault | None:
        """What happens to the request that has just arrived."""
        if self._queue:
            fault, times = self._queue.popleft()
            if times is None or times > 1:
                self._queue.appendleft((fault, times and times - 1))
            return fault
        if self._rate and self._random.random() < self._rate:
            return self._random.choice(self._faults)
        return None
