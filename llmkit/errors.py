"""Every error llmkit raises, in one tree.

::

    LLMKitError
    ├─ CallRejected                 policy refused; nothing more was sent
    │  ├─ BudgetExceeded            a cap would be broken
    │  ├─ GuardrailBlocked          a guard said no
    │  ├─ RateLimited               our own limit, not the provider's
    │  ├─ CircuitOpen               the endpoint's breaker is open
    │  ├─ ContextTooLong            more tokens than the model's window
    │  ├─ NotCached                 only a stored answer was wanted, and there is none
    │  └─ PriceUnknown              a USD cap is set and the model has no price
    ├─ ProviderError                the provider, or the way to it, failed
    │  ├─ AuthenticationError       401, 403, or no key
    │  ├─ InvalidRequest            the provider understood and said no
    │  ├─ ModelNotFound             404 for the model
    │  ├─ QuotaExhausted            no credit left; waiting does not help
    │  ├─ ProviderRateLimited       429
    │  ├─ ProviderOverloaded        5xx, 529 and the other transient statuses
    │  ├─ ProviderUnreachable       refused, reset, DNS, TLS
    │  ├─ ProviderTimeout
    │  │  ├─ ConnectTimeout         no connection
    │  │  ├─ FirstTokenTimeout      connected, but no first token
    │  │  ├─ IdleTimeout            silence between two chunks
    │  │  └─ TotalTimeout           the deadline of the whole call
    │  ├─ BadResponse               what came back is not the wire format
    │  │  └─ SchemaMismatch         the answer does not fit its schema
    │  ├─ StreamBroken              it ended in the middle
    │  ├─ EmptyReply                billed, but no text
    │  └─ Refused                   a refusal or a content filter
    ├─ AllModelsFailed              every link of a chain (an ExceptionGroup)
    ├─ ConfigError                  a wrong setting, before any spend
    ├─ StoreError                   the ledger or another store
    ├─ TemplateError                a prompt that cannot be rendered
    └─ ReplayMismatch               a replayed notebook asked something new

Every error knows what the call had cost when it was raised (``spent``, USD) and shows itself in a notebook as
one short block: what happened, what was spent, what to do next. Text that came from a server has been redacted
and cut before it gets here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmkit.money import money

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from decimal import Decimal
    from pathlib import Path

    from llmkit.reply import Reply, Usage

__all__ = [
    "AllModelsFailed",
    "AuthenticationError",
    "BadResponse",
    "BudgetExceeded",
    "CallRejected",
    "CircuitOpen",
    "ConfigError",
    "ConnectTimeout",
    "ContextTooLong",
    "EmptyReply",
    "FirstTokenTimeout",
    "GuardrailBlocked",
    "IdleTimeout",
    "InvalidRequest",
    "LLMKitError",
    "ModelNotFound",
    "NotCached",
    "PriceUnknown",
    "ProviderError",
    "ProviderOverloaded",
    "ProviderRateLimited",
    "ProviderTimeout",
    "ProviderUnreachable",
    "QuotaExhausted",
    "RateLimited",
    "Refused",
    "ReplayMismatch",
    "SchemaMismatch",
    "StoreError",
    "StreamBroken",
    "TemplateError",
    "TotalTimeout",
]


# Messages quote names, lines and files that others wrote, and a terminal would take these as commands.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def _plain(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)


class LLMKitError(Exception):
    """The root. ``except llmkit.LLMKitError`` catches everything llmkit raises on purpose.

    Attributes:
        message: what happened, in one sentence.
        next_step: what to do about it, in one sentence; empty where nothing can be said.
        spent: USD spent by the call until now, all attempts together; None where nothing was priced.
        unseen: how many of its attempts were sent and not seen to their end, so that they may be billed beyond ``spent``.
        reply: the partial reply, where text had arrived before the error; None otherwise.
        request_id: the call's id in the ledger; None where no call was made.
        latency_s: seconds from the start of the call until it failed; None where no call was made.
    """

    default_next_step: ClassVar[str] = ""

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(_plain(message))
        self.next_step = self.default_next_step if next_step is None else _plain(next_step)
        self.spent: Decimal | None = None
        self.unseen = 0
        self.reply: Reply | None = None
        self.request_id: str | None = None
        self.latency_s: float | None = None

    @property
    def message(self) -> str:  # a property, since ExceptionGroup's own ``message`` cannot be set
        return str(self.args[0])

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made anew from `args` alone, which lacks the keywords. A live reply stays in its process.
        return _revived, (type(self), self.args, {**self.__dict__, "reply": None})

    def block(self) -> str:
        """The error as a person reads it: one to four short lines of plain text."""
        lines = [f"{type(self).__name__}: {self.message}"]
        if self.spent is not None:
            spent = money(self.spent) if self.spent else "nothing"
            more = " that was seen; the provider may bill more" if self.unseen else ""
            lines.append(f"spent: {spent}{more}")
        if self.reply is not None and self.reply.text:
            lines.append(
                f"kept: {len(self.reply.text)} characters of the answer, in the variable and in error.reply.text"
            )
        if self.next_step:
            lines.append(f"next: {self.next_step}")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        # IPython's own hook: the cell fails (so "Run all" stops) without a page of frames.
        return self.block().split("\n")


def _revived(kind: type[LLMKitError], args: tuple[Any, ...], state: dict[str, Any]) -> LLMKitError:
    """An error out of its pickle, so that it gets from a worker process to whoever waits for it."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class CallRejected(LLMKitError):
    """Policy refused the call; nothing (more) was sent."""


class BudgetExceeded(CallRejected):
    """A cap would be broken by the worst case of the next attempt.

    Attributes:
        scope: which cap (``request``, or the name of a budget).
        limit, spent_before, held: in ``unit`` (``usd`` as Decimal, or ``tokens`` as int).
        needed: the worst case that did not fit, in the same unit.
        resets_at: when the scope starts anew; None for scopes that do not.
        unknown: what of ``spent_before`` is the worst case of attempts that nobody saw the end of.
        downgrade: whether a cheaper link of the chain may be used instead.
    """

    default_next_step = (
        "raise the cap (--max-cost, or [budget] in llmkit.toml), shorten the prompt, or lower --max-tokens"
    )

    def __init__(
        self,
        message: str,
        *,
        scope: str,
        limit: Decimal | int,
        needed: Decimal | int,
        unit: str = "usd",
        spent_before: Decimal | int = 0,
        held: Decimal | int = 0,
        resets_at: datetime | None = None,
        unknown: Decimal | int = 0,
        downgrade: bool = False,
        next_step: str | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.unknown = unknown
        self.downgrade = downgrade
        self.scope = scope
        self.limit = limit
        self.needed = needed
        self.unit = unit
        self.spent_before = spent_before
        self.held = held
        self.resets_at = resets_at


class NotCached(CallRejected):
    """The answer is not in the cache, and ``cache="only"`` forbids to ask for it."""

    default_next_step = "ask for it: --cache use"


class GuardrailBlocked(CallRejected):
    """A guard refused the prompt or the answer (``stage`` is ``input`` or ``output``)."""

    def __init__(self, message: str, *, stage: str, guard: str, reason: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.guard = guard
        self.reason = reason


class RateLimited(CallRejected):
    """llmkit's own rate limit. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CircuitOpen(CallRejected):
    """The endpoint's circuit breaker admits no call now.

    Attributes:
        endpoint: ``provider:model`` at its base URL.
        state: ``open``, ``half_open`` (all probes are out) or ``isolated`` (by hand).
        retry_after: seconds until the next probe is admitted; None when isolated by hand.
    """

    default_next_step = "wait, use another model (-m), or close it by hand: %llm breakers reset"

    def __init__(self, message: str, *, endpoint: str, state: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.state = state
        self.retry_after = retry_after


class ContextTooLong(CallRejected):
    """The prompt does not fit the model's window. ``tokens`` and ``window`` are None where nobody said."""

    default_next_step = "shorten the prompt, or use a model with a larger window"

    def __init__(self, message: str, *, tokens: int | None, window: int | None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.window = window


class PriceUnknown(CallRejected):
    """A USD cap is set, and the price of ``model`` is not known, so the cap could not be kept."""

    default_next_step = "set its price: [models.NAME] price = { input = …, output = … } (USD per million tokens)"

    def __init__(self, message: str, *, model: str) -> None:
        super().__init__(message)
        self.model = model


class ProviderError(LLMKitError):
    """The provider, or the way to it, failed.

    Attributes:
        provider, model: who was asked, and for what.
        status: the HTTP status; None where there was none.
        retryable: whether the same request may succeed a little later.
        transient: whether errors of this class say that the endpoint is unwell, rather than that the request is wrong.
        retry_after: seconds the server asked us to wait; None where it did not say.
        provider_request_id: the provider's own id of the request, for its support desk.
        maybe_billed: the request was sent and its end was never seen, so it may appear on the bill.
        usage: tokens the provider reported although there is no reply to hold them; None otherwise.
    """

    transient: ClassVar[bool] = False
    retryable_by_default: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        provider: str = "",
        model: str = "",
        status: int | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        provider_request_id: str | None = None,
        maybe_billed: bool = False,
        next_step: str | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.provider = provider
        self.model = model
        self.status = status
        self.retryable = self.retryable_by_default if retryable is None else retryable
        self.retry_after = retry_after
        self.provider_request_id = provider_request_id
        self.maybe_billed = maybe_billed
        self.usage: Usage | None = None


class AuthenticationError(ProviderError):
    """401, 403, or no key at all."""

    default_next_step = "check the environment variable that holds the key (its value is never shown)"


class InvalidRequest(ProviderError):
    """The provider understood the request and refused it (400, 413, 422 …). The same request would fail again."""


class ModelNotFound(ProviderError):
    """The provider does not have this model, or this key may not use it."""

    default_next_step = "check the model's name; the provider's own list is at its /models"


class QuotaExhausted(ProviderError):
    """The account has no credit left. Waiting does not help, so it is never retried."""

    default_next_step = "add credit at the provider, or use another one (-m)"


class ProviderRateLimited(ProviderError):
    """429: too many requests or tokens for the account's limit."""

    transient = True
    retryable_by_default = True
    default_next_step = "wait a little, lower the concurrency, or add a fallback"


class ProviderOverloaded(ProviderError):
    """408, 409, 425, 500, 502, 503, 504, 529: the provider cannot just now."""

    transient = True
    retryable_by_default = True
    default_next_step = "try again later, or add a fallback to the model's chain"


class ProviderUnreachable(ProviderError):
    """No connection, or it was lost before the first token."""

    transient = True
    retryable_by_default = True
    default_next_step = "check the base URL and that the server runs"


class ProviderTimeout(ProviderError):
    """A time limit ran out. ``limit`` is that limit in seconds."""

    transient = True
    retryable_by_default = True
    default_next_step = "raise the limit ([timeout] in llmkit.toml, or --timeout), or use a faster model"

    def __init__(self, message: str, *, limit: float, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.limit = limit


class ConnectTimeout(ProviderTimeout):
    """No connection within ``[timeout] connect``."""


class FirstTokenTimeout(ProviderTimeout):
    """Connected, but no first token within ``[timeout] first_token``."""


class IdleTimeout(ProviderTimeout):
    """Silence between two chunks for longer than ``[timeout] idle``."""

    retryable_by_default = False


class TotalTimeout(ProviderTimeout):
    """The deadline of the whole call, waits included (``[timeout] total``)."""

    retryable_by_default = False


class BadResponse(ProviderError):
    """What came back is not the wire format: HTML, garbage, no content, or more than the size limit."""

    transient = True


class SchemaMismatch(BadResponse):
    """The answer does not fit the schema of its call. ``reply`` is the last one; its text is kept, and it is billed.

    Attributes:
        problems: what is wrong with it, in at most ten short sentences.
        repaired: whether it had been asked for once more.
    """

    transient = False
    problems: tuple[str, ...] = ()  # also of one that another process told of
    repaired: bool = False
    default_next_step = "simplify the schema, say in the prompt what each field means, or use another model (-m)"

    def __init__(self, message: str, *, problems: Sequence[str] = (), repaired: bool = False, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)
        self.repaired = repaired

    def block(self) -> str:
        head, *rest = super().block().split("\n")
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems), *rest])


class StreamBroken(ProviderError):
    """The stream ended, or carried an error, after text had arrived. ``text_so_far`` is that text."""

    transient = True
    default_next_step = "run it again; what had arrived is kept"

    def __init__(self, message: str, *, text_so_far: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.text_so_far = text_so_far


class EmptyReply(ProviderError):
    """The reply is complete and billed, but has no text. ``reasoning_tokens`` says where the tokens went."""

    default_next_step = "raise --max-tokens, or lower the reasoning effort"

    def __init__(self, message: str, *, reasoning_tokens: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.reasoning_tokens = reasoning_tokens


class Refused(ProviderError):
    """The model refused, or a content filter stopped it. ``reason`` is the provider's word or the model's text."""

    default_next_step = "rephrase the prompt, or use another model (-m)"

    def __init__(self, message: str, *, reason: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.reason = reason


class AllModelsFailed(LLMKitError, ExceptionGroup[LLMKitError]):
    """Every link of the chain failed or was skipped; ``exceptions`` holds one error a link, in their order."""

    default_next_step = "see the errors above; %llm why shows the life of the call"

    # ExceptionGroup builds itself in __new__, whose signature differs from LLMKitError's.
    def __new__(cls, message: str, errors: Sequence[LLMKitError]) -> Self:
        return super().__new__(cls, message, errors)

    def __init__(self, message: str, errors: Sequence[LLMKitError]) -> None:
        LLMKitError.__init__(self, message)
        self.args = (self.message, errors)
        self.errors = tuple(errors)

    def derive(self, excs: Sequence[Exception], /) -> AllModelsFailed:  # type: ignore[override]
        return AllModelsFailed(self.message, excs)  # type: ignore[arg-type]

    def block(self) -> str:
        head, *rest = super().block().split("\n")
        each = [f"  - {type(e).__name__}: {e.message}" for e in self.errors]
        return "\n".join([head, *each, *rest])


class ConfigError(LLMKitError):
    """A wrong setting. ``file`` and ``line`` (1-based) name the place; None where there is none."""

    def __init__(
        self, message: str, *, file: Path | None = None, line: int | None = None, next_step: str | None = None
    ) -> None:
        place = "" if file is None else f"{file}, line {line}: " if line is not None else f"{file}: "
        super().__init__(place + message, next_step=next_step)
        self.file = file
        self.line = line


class StoreError(LLMKitError):
    """The ledger or another store cannot be read or written."""


class TemplateError(LLMKitError):
    """A prompt that cannot be rendered. ``name`` is the missing or unsafe name, where there is one."""

    def __init__(self, message: str, *, name: str | None = None, next_step: str | None = None) -> None:
        super().__init__(message, next_step=next_step)
        self.name = name


class ReplayMismatch(LLMKitError):
    """A replayed notebook asked for something that was not recorded.

    ``difference``: three lines, the nearest recorded question and where it differs first; empty where none is near.
    """

    def __init__(self, message: str, *, difference: str = "", next_step: str | None = None) -> None:
        super().__init__(message, next_step=next_step)
        self.difference = difference

    def block(self) -> str:
        head, *rest = super().block().split("\n")
        return "\n".join([head, *self.difference.split("\n"), *rest] if self.difference else [head, *rest])
