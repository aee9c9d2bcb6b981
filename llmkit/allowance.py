"""How much output an attempt may produce, and the end of a stream that has reached it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.models import tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmkit.call import Call
    from llmkit.reply import Chunk, Reply

__all__ = ["Allowance", "Cutter"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """Output tokens an attempt may produce, and which cap says so (``max_cost`` or ``max_tokens``).

    ``held``: for how many there is room, where that is more.
    """

    tokens: int
    cap: str
    held: int = 0


class Cutter:
    """Ends a stream that reaches its allowance, for servers that do not keep the limit they were sent.

    Exact counting is dear, so it is done only when the cheap upper bound of what has arrived since the last exact
    count (its UTF-8 bytes) could reach what is left.
    """

    def __init__(self, reply: Reply, call: Call, allowance: Allowance) -> None:
        self._reply = reply
        self._endpoint = call.endpoint
        self._allowance = allowance
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._counted = 0
        self._chunks = 0

    async def cut(self, batches: AsyncIterator[list[Chunk]]) -> AsyncIterator[list[Chunk]]:
        self._note(self._reply.arrived)
        async for batch in batches:
            yield batch
            self._note(batch)
            if self._counted + self._pending_bytes > self._allowance.tokens and await self._reached():
                self._reply.cut = self._allowance.cap
                return

    def _note(self, batch: list[Chunk]) -> None:
        for chunk in batch:
            self._pending.append(chunk.reasoning)
            self._pending.append(chunk.text)
            self._pending_bytes += len(chunk.text.encode("utf-8", "replace"))
            self._pending_bytes += len(chunk.reasoning.encode("utf-8", "replace"))
        self._chunks += len(batch)

    async def _reached(self) -> bool:
        count = await tokens.count(self._endpoint, "".join(self._pending))
        self._counted += count.tokens
        self._pending.clear()
        self._pending_bytes = 0
        if count.exact:
            return self._counted > self._allowance.tokens
        # A chunk is at least a token, so that is certain. Our estimate may be above the server's own count, and below it.
        self._counted = max(self._counted, self._chunks)
        return (self._chunks if self._allowance.cap == "max_tokens" else self._counted) > self._allowance.tokens
