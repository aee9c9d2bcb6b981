"""The chain: layers, outermost first, down to a provider.

A layer is any ``async (call, call_next) -> reply``. ``await call_next(call)`` returns at the reply's first token, so
"retry only before the first token" is an ordinary ``try`` round that ``await``. What must happen at the end of a
reply, or when it never begins, is one hook: `llmkit.reply.settled`. A layer that received a reply and does not
return it must close or read it. No layer keeps anything of one call on ``self``.

The standard order is the list in `llmkit.layers.standard`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from llmkit.call import Call
from llmkit.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CallNext", "Layer", "Pipeline"]

CallNext = Callable[[Call], Awaitable[Reply]]


class Layer(Protocol):
    """One concern of the chain."""

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        """Hand ``call`` on, and give back the reply that comes up, or raise an `llmkit.LLMKitError`."""


class Pipeline:
    """Layers, outermost first, above a provider; itself a `CallNext`."""

    def __init__(self, layers: Sequence[Layer], provider: CallNext) -> None:
        self.layers = tuple(layers)
        self.provider = provider
        self._first = provider
        for layer in reversed(self.layers):
            self._first = partial(layer.__call__, call_next=self._first)  # bound once, not at each call

    def __call__(self, call: Call) -> Awaitable[Reply]:
        return self._first(call)
