"""A recording: a file of JSON lines. First what it is, then a call a line, in the order in which they were asked.

A line is appended when its call has ended, so whatever becomes of the process, all calls that had ended are there. What
is recorded anew is appended as well; the later of two lines holds. When recording ends, the file is written once more in
its order, with one line a call. While it is recorded to, it is locked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.recording.told import Malformed, Told

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmkit.recording.asked import Asked

__all__ = ["MAX_BYTES", "MAX_LINE", "Recording", "Take", "header", "parsed", "read"]

FORMAT, VERSION = "llmkit-recording", 1
MAX_BYTES = 512 * 1024 * 1024
MAX_LINE = 128 * 1024 * 1024
MOST_CALLS = 100_000
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HALF = re.compile(r"[\ud800-\udfff]")  # of a character: no text can hold it
_ESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029]")  # editors take some of these for the end of a line
_START_ANEW = "%llm record {name} --overwrite begins it anew"


@dataclass(slots=True)
class Take:
    """One recorded call: the ``number``-th (from 1) time that its question was asked.

    Attributes:
        asked: the question as people read it. told: how it ended, as `llmkit.recording.told` writes it.
    """

    digest: str
    number: int
    also: tuple[str, ...]
    asked: dict[str, Any]
    told: dict[str, Any]
    _checked: Told | None = None

    @classmethod
    def of(cls, asked: Asked, number: int, form: dict[str, Any], told: dict[str, Any]) -> Take:
        """``form``: the question as it may be written."""
        return cls(asked.digest, number, asked.also, form, told)

    @property
    def key(self) -> tuple[str, int]:
        return (self.digest, self.number)

    def checked(self) -> Told:
        """How it ended.

        Raises:
            Malformed: it is not what this version writes.
        """
        if self._checked is None:
            self._checked = Told(self.told)
        return self._checked

    def line(self) -> str:
        """The line of the file, with its end."""
        also = {"also": list(self.also)} if self.also else {}
        return _line({"digest": self.digest, "n": self.number, **also, "asked": self.asked, **self.told})


def _line(fields: Mapping[str, Any]) -> str:
    text = _HALF.sub("?", json.dumps(fields, ensure_ascii=False, allow_nan=False))
    return _ESCAPED.sub(lambda match: f"\\u{ord(match.group()):04x}", text) + "\n"


@dataclass
class Recording:
    """What is in a file.

    Attributes:
        head: ``default`` (the model of calls that named none), ``greeting`` (what the notebook said when llmkit was
            loaded), ``scrubbed`` (whether personal data was taken out); as far as they are known.
        takes: the calls by question and number, in their order.
        torn: whether the last line was cut off, as when a process dies while it writes; it is left out.
    """

    head: dict[str, Any] = field(default_factory=dict)
    takes: dict[tuple[str, int], Take] = field(default_factory=dict)
    torn: bool = False
    names: dict[str, str] = field(default_factory=dict)
    """From each digest that a question is known under to the one that it is kept under."""

    def add(self, take: Take) -> None:
        self.takes[take.key] = take
        self.names[take.digest] = take.digest
        for digest in take.also:
            self.names.setdefault(digest, take.digest)

    def copy(self) -> Recording:
        """What is in it now."""
        return Recording(dict(self.head), dict(self.takes), self.torn, dict(self.names))

    def known_as(self, asked: Asked) -> str | None:
        """The digest that this question is kept under; None where it is not."""
        return next((self.names[each] for each in (asked.digest, *asked.also) if each in self.names), None)

    def take(self, digest: str, number: int) -> Take:
        """What that question was answered the ``number``-th time; beyond the last time, what it was then."""
        while (digest, number) not in self.takes:
            number -= 1
            if number < 1:  # its first answers are missing
                return next(take for key, take in self.takes.items() if key[0] == digest)
        return self.takes[digest, number]

    def text(self) -> str:
        """The whole file."""
        return "".join([header(self.head), *(take.line() for take in self.takes.values())])


def header(head: Mapping[str, Any]) -> str:
    """The first line."""
    return _line({"format": FORMAT, "version": VERSION, **{name: value for name, value in head.items() if value}})


def read(path: Path) -> Recording:
    """The recording at ``path``.

    Raises:
        ConfigError: there is none, with the line that is not what it should be.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe may never end
            raise ConfigError("cannot be read: it is no file", file=path)
        with path.open("rb") as source:
            content = source.read(MAX_BYTES + 1)
    except OSError as error:
        step = f"%llm record {path.name} makes one" if isinstance(error, FileNotFoundError) else None
        raise ConfigError(f"cannot be read: {error.strerror}", file=path, next_step=step) from None
    return parsed(content, path)


def parsed(content: bytes, path: Path) -> Recording:
    """The recording in ``content``. Raises as `read` does."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"longer than {MAX_BYTES >> 20} MiB", file=path)
    lines = content.split(b"\n")
    recording = Recording(torn=bool(lines.pop()))
    if not lines:
        raise _wrong(path, 1, "this is no recording of llmkit")
    for number, line in enumerate(lines, 1):
        if line.strip():
            _add(recording, line, path, number)
    return recording


def _add(recording: Recording, line: bytes, path: Path, number: int) -> None:
    try:
        fields = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _wrong(path, number, "this is no recording of llmkit" if number == 1 else "not a line of JSON")
    if "format" in fields or number == 1:
        recording.head = _head(fields, path, number)
        return
    try:
        recording.add(_take(fields))
    except Malformed as error:
        raise _wrong(path, number, f"not a recorded call: {error}") from None
    if len(recording.takes) > MOST_CALLS:
        raise _wrong(path, number, f"more than {MOST_CALLS:,} calls")


def _wrong(path: Path, number: int, message: str) -> ConfigError:
    step = "take the line out, or record the notebook again" if number > 1 else "give the path of a recorded file"
    return ConfigError(message, file=path, line=number, next_step=step)


def _head(fields: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    if fields.get("format") != FORMAT:
        raise _wrong(path, number, "this is no recording of llmkit")
    if fields.get("version") != VERSION:
        message = f"a recording of version {fields.get('version')!s:.20}, and this llmkit reads version {VERSION}"
        raise ConfigError(message, file=path, line=number, next_step=_START_ANEW.format(name=path.name))
    head: dict[str, Any] = {name: fields[name] for name in ("default", "greeting", "scrubbed") if name in fields}
    texts = (head.get("default", ""), head.get("greeting", ""))
    if not all(isinstance(text, str) and len(text) <= 10_000 for text in texts):
        raise _wrong(path, number, "its first line is of the wrong kind")
    return head


def _take(fields: dict[str, Any]) -> Take:
    digest, number, also, asked = fields.get("digest"), fields.get("n"), fields.get("also", []), fields.get("asked")
    digests = [digest, *also] if isinstance(also, list) else [None]
    if not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests):
        raise Malformed("its digest is missing, or none")
    if type(number) is not int or not 1 <= number <= MOST_CALLS or not isinstance(asked, dict):
        raise Malformed("its number or its question is missing")
    if not isinstance(asked.get("model"), str) or not isinstance(asked.get("messages"), list):
        raise Malformed("its question has no model or no messages")
    told: dict[str, Any] = {name: fields[name] for name in ("answer", "error", "way", "run") if name in fields}
    take = Take(str(digest), number, tuple(also), asked, told)
    take.checked()
    return take
