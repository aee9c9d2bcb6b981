"""What the simulator writes down about each request, and how it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmkit.reply import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmkit.clock import Clock
    from llmkit.testing.faults import Fault

__all__ = ["Answered", "Headers", "Received", "Settings", "State", "added"]

State = Literal["open", "complete", "broken", "left", "stopped"]

_SECRET = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})


class Headers(dict[str, str]):
    """Headers by their names in lower case. Tests may look at all of them; the repr shows no secret."""

    def __repr__(self) -> str:
        return repr({name: "…" if name in _SECRET else value for name, value in self.items()})


class Answered(NamedTuple):
    """A request that was answered under an ``Idempotency-Key``, and all that was billed for it so far."""

    body: Any
    billed: Usage


@dataclass(slots=True, eq=False)
class Received:
    """A request that reached the simulator, and what became of it.

    Attributes:
        number: 1 for the first call; 0 for what is no call (a list of models, a wrong path).
        headers: names in lower case; the repr leaves out the values that are secret.
        body: the parsed JSON; None where it was none.
        fault: what was made to go wrong.
        status: of the response; None where none was sent.
        state: ``open``; then ``complete``, ``broken`` (by a fault), ``left`` (by the client) or ``stopped`` (with the
            server).
        input_tokens, cached_input_tokens, output_tokens, reasoning_tokens: what is billed so far.
        repeats: what was answered before under the same ``Idempotency-Key``; what was billed then is not billed again.
    """

    method: str
    path: str
    headers: Headers
    body: Any = field(repr=False)
    number: int = 0
    fault: Fault | None = None
    status: int | None = None
    state: State = "open"
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    repeats: Answered | None = field(default=None, repr=False)

    @property
    def billed(self) -> Usage:
        """What this request costs so far. Billing begins with the first token; errors cost nothing."""
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cached_input_tokens=self.cached_input_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the service behaves towards everyone; see `llmkit.testing.Simulator`."""

    answer: str | Callable[[dict[str, Any]], str] | None
    seed: int
    clock: Clock
    latency_s: float
    token_delay_s: float
    models: tuple[str, ...]
    usage: str
    reasoning_tokens: int
    show_reasoning: bool
    cached_tokens: int
    window: int | None


def added(usages: Iterable[Usage]) -> Usage:
    """The sum of them all."""
    total = Usage()
    for usage in usages:
        total = Usage(
            input_tokens=total.input_tokens + usage.input_tokens,
            output_tokens=total.output_tokens + usage.output_tokens,
            cached_input_tokens=total.cached_input_tokens + usage.cached_input_tokens,
            reasoning_tokens=total.reasoning_tokens + usage.reasoning_tokens,
        )
    return total
