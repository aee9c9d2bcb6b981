"""How events become bytes: as most servers write them, and in all the other ways that are lawful."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.testing.wires import Frame, dumps

if TYPE_CHECKING:
    from llmkit.testing.wires import Generation, Wire

__all__ = ["Framer", "around", "encoded", "split"]


def encoded(frame: Frame) -> bytes:
    """A server-sent event, written as most servers write it."""
    event = f"event: {frame.event}\n" if frame.event else ""
    return f"{event}data: {frame.data}\n\n".encode("utf-8", "replace")


class Framer:
    """Writes events in unusual but lawful ways (see `llmkit.testing.faults.FRAMINGS`)."""

    def __init__(self, variants: tuple[str, ...]) -> None:
        self.variants = frozenset(variants)
        self._held = bytearray()

    def blocks(self, frame: Frame) -> list[bytes]:
        if not self.variants:
            return [encoded(frame)]
        content = self._dressed(frame)
        if "glued" in self.variants:
            self._held += content
            return []
        return split(content, tuple(self.variants))

    def rest(self) -> list[bytes]:
        return split(bytes(self._held), tuple(self.variants)) if self._held else []

    def _dressed(self, frame: Frame) -> bytes:
        space = "" if "no_space" in self.variants else " "
        end = "\r\n" if "crlf" in self.variants else "\n"
        lines = [f"event:{space}{frame.event}"] if frame.event else []
        if "extra_fields" in self.variants:
            lines = ["id: 7", "retry: 3000", "unknown: field", *lines]
        if "comments" in self.variants:
            lines = [": keep-alive", "", ":", *lines]
        lines += [f"data:{space}{frame.data}", "", ""]
        return end.join(lines).encode("utf-8", "replace")


def split(content: bytes, variants: tuple[str, ...]) -> list[bytes]:
    """The blocks in which these bytes go out; always at least one."""
    if "bytes" in variants:
        return [content[index : index + 1] for index in range(len(content))]
    if "halves" in variants:
        # Inside a character, where there is one of several bytes: that is where readers trip.
        inside = next((index for index, byte in enumerate(content) if byte >= 0xC0), len(content) // 2)
        return [block for block in (content[: inside + 1], content[inside + 1 :]) if block]
    return [content]


def around(wire: Wire, generation: Generation) -> tuple[bytes, bytes]:
    """A good answer of one token, cut where its text is."""
    mark = f"here-{generation.digest}"
    generation.answer, generation.reasoning = [mark], []
    if generation.ask.stream:
        content = b"".join([encoded(frame) for frame in wire.frames(generation)])
    else:
        content = dumps(wire.whole(generation)).encode("utf-8", "replace")
    before, _, after = content.partition(mark.encode())
    return before, after
