"""Server-sent events, read from bytes as they come from the socket.

Only what the chat APIs need: the ``data`` of each event. Comments and the fields ``event``, ``id`` and ``retry``
are passed over (each payload names its own type). Frames may be cut anywhere, a UTF-8 sequence or a CRLF included.
"""

from __future__ import annotations

__all__ = ["MAX_EVENT_BYTES", "EventReader", "EventTooLarge"]

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Most bytes of one event, or of one line; more is not a token but an attack or an accident."""

_BOM = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """One event, or one line, is larger than `MAX_EVENT_BYTES`."""


class EventReader:
    """Gather the payloads of a stream: `feed` it what arrives, and `end` it.

    Raises:
        EventTooLarge: the only error there is; any other bytes give payloads, or none.
    """

    __slots__ = ("_data", "_data_size", "_fresh", "_held", "_line", "_line_size", "_skip_newline")

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of a line whose end has not arrived
        self._line_size = 0
        self._data: list[bytes] = []  # the data lines of an event whose end has not arrived
        self._data_size = 0
        self._skip_newline = False  # the last byte was a CR, so a LF now belongs to it
        self._fresh = True  # nothing but a part of a byte order mark has been seen
        self._held = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the events that ``data`` completes."""
        if self._fresh or self._skip_newline or b"\r" in data:
            data = self._normalised(data)
        # One whole frame a read is what most reads are.
        whole = data[:6] == b"data: " and data[-1:] == b"\n" and data.find(b"\n") == len(data) - 2 <= MAX_EVENT_BYTES
        if whole and not self._line and not self._data:
            return [data[6:-2]]
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._line:
            lines[0] = b"".join([*self._line, lines[0]])
            self._line.clear()
            self._line_size = 0
        payloads = self._take(lines)
        if rest:
            self._line.append(rest)
            self._line_size = _bounded(self._line_size + len(rest))
        return payloads

    def end(self) -> list[bytes]:
        """The payload of an event that lacks its final blank line, if there is one."""
        rest = b"".join([self._held, *self._line])
        self._held = b""
        self._line.clear()
        self._line_size = 0
        return self._take([rest, b""])

    def _normalised(self, data: bytes) -> bytes:
        """``data`` with every line end as LF, and without a byte order mark at the start of the stream."""
        if self._fresh:
            data = self._held + data
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._held = data
                return b""
            self._fresh = False
            self._held = b""
            data = data.removeprefix(_BOM)
        if self._skip_newline and data:
            data = data.removeprefix(b"\n")
            self._skip_newline = False
        if b"\r" in data:
            self._skip_newline = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _take(self, lines: list[bytes]) -> list[bytes]:
        payloads = []
        data = self._data
        for line in lines:
            if line[:5] == b"data:":
                data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._data_size = _bounded(self._data_size + len(line))
            elif line == b"data":
                data.append(b"")
                self._data_size = _bounded(self._data_size + len(line))
            elif not line and data:
                payloads.append(data[0] if len(data) == 1 else b"\n".join(data))
                data.clear()
                self._data_size = 0
        return payloads


def _bounded(size: int) -> int:
    if size > MAX_EVENT_BYTES:
        raise EventTooLarge(f"an event of more than {MAX_EVENT_BYTES} bytes")
    return size
