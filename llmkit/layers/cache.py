"""The same question is not paid for twice: an answer that is stored is given again, at no cost.

What "the same" means is the request's key, which this layer is handed a maker of. A chain has two keys. What its first
link answers is kept under that link's own key, and serves everybody who asks that model; what a later link answers is
kept under the key of the whole chain, and serves only those who accept the same chain: a premium model that is asked
directly is never answered by the cheap one that once stood in for it.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from llmkit.answer import Answer
from llmkit.errors import NotCached
from llmkit.events import CacheLooked, emit
from llmkit.reply import settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmkit.cache import AnswerCache
    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.endpoint import Endpoint
    from llmkit.flight import SingleFlight
    from llmkit.pipeline import CallNext
    from llmkit.reply import Outcome, Reply

__all__ = ["Cache"]


class Cache:
    """Answers from ``answers`` what it can, and keeps there what is worth it.

    Args:
        key_of: the key of a call at an endpoint; None where it has none.
        flights: calls that are shared while they are in flight; None where each is asked by itself.
    """

    def __init__(
        self,
        answers: AnswerCache,
        key_of: Callable[[Call, Endpoint], str | None],
        clock: Clock,
        flights: SingleFlight | None = None,
    ) -> None:
        self._answers = answers
        self._key_of = key_of
        self._clock = clock
        self._flights = flights

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        mode, answers = call.cache, self._answers
        if mode == "off" or not answers.enabled:
            _tell(call, "off")
            if mode == "only":
                raise NotCached("the cache is off ([cache] enabled), so nothing is stored in it")
            return await call_next(call)
        keys = self.keys(call)
        if keys is None:
            _tell(call, "off")
            if mode == "only":
                raise NotCached("this request cannot be stored, so there is no answer to it")
            return await call_next(call)
        if mode != "refresh":
            copy = answers.copy_of(keys[0])
            answer = copy or await self._found(keys)
            if answer is not None:
                _tell(call, "store" if copy is None else "memory", answer)
                return self._hit(call, answer)
        _tell(call, "refresh" if mode == "refresh" else "miss")
        return await self._asked(_Asking(self, call, call_next, keys))

    async def plan(self, call: Call) -> Answer | None:
        """The answer that would be given again; None where somebody would be asked. Nothing is changed by looking.

        Raises:
            NotCached: the call may not ask, and there is no answer.
        """
        answer = None
        keys = () if call.cache == "off" or not self.is_on else self.keys(call) or ()
        if call.cache != "refresh":
            for key in keys:
                answer = answer or await self._answers.peek(key)
        if answer is None and call.cache == "only":
            raise NotCached("the answer to this request is not in the cache" if keys else "nothing can be stored of it")
        return answer

    @property
    def is_on(self) -> bool:
        """Whether anything is looked up or stored at all."""
        return self._answers.enabled

    def keys(self, call: Call) -> tuple[str, ...] | None:
        """The key of the first link, and of the whole chain where there is more than one; None: it cannot be stored."""
        if len(call.route) == 1:
            key = self._key_of(call, call.route[0].endpoint)
            return None if key is None else (key,)
        first = _first(call)
        key = None if first is None else self._key_of(call, first)
        if key is None:
            return None
        links = [
            f"{self._key_of(call, link.endpoint)} {sorted(link.only_on)}" for link in call.route if not link.disabled
        ]
        return (key, sha256("\n".join(links).encode()).hexdigest()) if len(links) > 1 else (key,)

    async def _found(self, keys: tuple[str, ...]) -> Answer | None:
        for key in keys:
            if (answer := await self._answers.find(key)) is not None:
                return answer
        return None

    def _hit(self, call: Call, answer: Answer) -> Reply:
        call.trail.saved = answer.cost
        self._answers.served(answer)
        return answer.reply(call, self._clock)

    async def _asked(self, asking: _Asking) -> Reply:
        call = asking.call
        if self._flights is not None:
            reply = await self._flights.share(asking.keys[-1], call, asking)
            if reply is not None:
                return reply
        elif call.cache != "only":
            return await settled(asking.ask(), asking.store)
        self._answers.misses += 1
        raise NotCached("the answer to this request is not in the cache")


class _Asking:
    """One call whose answer was not there."""

    __slots__ = ("_call_next", "_layer", "call", "keys")

    def __init__(self, layer: Cache, call: Call, call_next: CallNext, keys: tuple[str, ...]) -> None:
        self._layer = layer
        self._call_next = call_next
        self.call = call.to(request_key=keys[-1])
        self.keys = keys

    async def look(self) -> Reply | None:
        if self.call.cache == "refresh":
            return None
        answer = await self._layer._found(self.keys)
        if answer is None:
            return None
        _tell(self.call, "store", answer)
        return self._layer._hit(self.call, answer)

    async def ask(self) -> Reply:
        self._layer._answers.misses += 1
        return await self._call_next(self.call)

    async def store(self, outcome: Outcome) -> None:
        answer = Answer.of(outcome, self._layer._clock.time())
        if answer is None or outcome.reply is None:
            return
        link = outcome.reply.call.link
        by_first = len(self.keys) == 1 or (link is not None and link.endpoint == _first(self.call))
        key = self.keys[0] if by_first else self.keys[1]
        renew = self.call.cache == "refresh"
        if renew and not by_first:  # the first link's old answer would go before this one
            await self._layer._answers.drop(self.keys[0])
        await self._layer._answers.keep(key, answer, namespace=self.call.namespace, renew=renew)


def _tell(call: Call, found: str, answer: Answer | None = None) -> None:
    if call.trail.listener is not None:
        saved = None if answer is None else answer.cost
        emit(call, CacheLooked(call.request_id, call.cache, found, saved))


def _first(call: Call) -> Endpoint | None:
    """Of the first link that is used when nothing is wrong."""
    for link in call.route:
        if not link.disabled and not link.only_on:
            return link.endpoint
    return None
