"""Recording to a file, by everybody in this process who records to it, and by nobody else.

The file is locked by the operating system, which frees it when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.lock import new_lock
from llmkit.recording.file import MAX_BYTES, MAX_LINE, Recording, Take, header, parsed

if TYPE_CHECKING:
    from llmkit.recording.asked import Asked
    from llmkit.recording.scrubbing import Scrub

__all__ = ["Recorder", "leave", "recorder_at"]

log = logging.getLogger("llmkit")

if sys.platform == "win32":
    import msvcrt

    _PLACE = 2**31 - 2  # beyond what is written: a lock there keeps nobody from reading

    def _lock(file: int) -> None:
        os.lseek(file, _PLACE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock(file: int) -> None:
        os.lseek(file, _PLACE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: int) -> None:
        # Not lockf: that lock would be lost as soon as a cell opens the file to look into it, and closes it again.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)


class Recorder:
    """A file that calls are recorded to. Made by `recorder_at`; safe to use from several threads.

    Attributes:
        path: the file. recording: what is in it. count: calls recorded since it was opened.
        overwritten: whether what was in it is gone. scrub: takes out what must not stand in it.
    """

    def __init__(self, path: Path, scrub: Scrub, *, overwrite: bool) -> None:
        self.path = path
        self.scrub = scrub
        self.count = 0
        self.users = 0
        self._process = os.getpid()
        self._guard = new_lock()
        self._numbers: dict[str, int] = {}
        self._run: str | None = None
        self._cells: dict[str, dict[str, list[int]]] = {}  # by cell, the questions of its last run with their numbers
        self._asking: dict[str, list[int]] = {}
        self._again: dict[str, list[int]] = {}
        self._file = _opened(path)
        try:
            self.recording = self._held(overwrite=overwrite)
        except BaseException:
            self._leave()
            raise
        self._order = {key: index for index, key in enumerate(self.recording.takes)}
        self.tell(scrubbed=scrub.of_people or bool(self.recording.head.get("scrubbed")))

    def _held(self, *, overwrite: bool) -> Recording:
        """What the file holds, made fit to be appended to."""
        content = _content(self._file, self.path)
        if not content:
            return Recording()
        if overwrite and b"\n" in content:
            parsed(content[: content.index(b"\n") + 1], self.path)  # only a recording is thrown away unasked
            os.ftruncate(self._file, 0)
            return Recording()
        recording = parsed(content, self.path)
        if recording.torn:
            log.warning("%s: its last line was cut off, and is left out", self.path)
            os.ftruncate(self._file, content.rindex(b"\n") + 1)
        return recording

    def tell(self, **head: Any) -> None:
        """Note what the file as a whole should say, see `Recording.head`."""
        with self._guard:
            told = {**self.recording.head, **self.scrub.tree({name: value for name, value in head.items() if value})}
            if told != self.recording.head or not os.fstat(self._file).st_size:
                self.recording.head = told
                self._append(header(told))

    def within(self, cell: str | None, run: str | None) -> None:
        """The calls that follow belong to that run of that cell; None where nobody knows.

        A cell that is run again asks its questions again, and has one output: what it is told now takes the place of
        what it was told before, and is not one time more.
        """
        with self._guard:
            if cell is None:
                self._asking, self._again = {}, {}
            elif run != self._run:
                self._again, self._asking = self._cells.get(cell, {}), {}
                self._cells[cell] = self._asking
            self._run = None if cell is None else run

    def begin(self, asked: Asked) -> int:
        """A question is asked: for the how many-th time since the recorder was opened."""
        digest = asked.digest
        with self._guard:
            if again := self._again.get(digest):
                number = again.pop(0)
            else:
                number = self._numbers[digest] = self._numbers.get(digest, 0) + 1
            self._asking.setdefault(digest, []).append(number)
            self._order.setdefault((digest, number), len(self._order))
            return number

    def skip(self, asked: Asked, number: int) -> None:
        """A question was interrupted: the next time that it is asked counts instead."""
        with self._guard:
            if self._numbers.get(asked.digest) == number:
                self._numbers[asked.digest] = number - 1
                mine = self._asking.get(asked.digest, [])
                if number in mine:
                    mine.remove(number)

    def write(self, asked: Asked, number: int, told: dict[str, Any]) -> None:
        """A question was answered.

        Raises:
            OSError: it cannot be written. ValueError: it is too large.
        """
        take = Take.of(asked, number, self.scrub.tree(asked.form), told)
        line = take.line()
        with self._guard:
            if len(line) > MAX_LINE // 4:  # characters have up to four bytes
                raise ValueError("the call is too large for a recording")
            if not _is_at(self._file, self.path):
                self._begin_again()
            if os.fstat(self._file).st_size + 4 * len(line) > MAX_BYTES:
                raise ValueError("the recording is full")
            self._append(line)
            self.recording.add(take)
            self.count += 1

    def _begin_again(self) -> None:
        """Somebody removed the file, or put another one there: go on in that."""
        old, self._file = self._file, _opened(self.path)
        os.close(old)
        if not os.fstat(self._file).st_size:
            self._append(self.recording.text())
        else:
            self.recording = self._held(overwrite=False)

    def _append(self, text: str) -> None:
        data, done = text.encode(), 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        finally:
            if 0 < done < len(data):
                self._take_back(done)

    def _take_back(self, done: int) -> None:
        """A full disk: half a line is none."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, os.fstat(self._file).st_size - done)

    def finish(self) -> None:
        """Write it in its order, with one line a call, and give it free."""
        with self._guard:
            if self._file < 0:
                return
            try:
                if self._process == os.getpid():  # a forked child has only added to it
                    self._put_in_order()
            except (OSError, ConfigError) as error:
                log.warning("%s is left as it was written: %s", self.path, error)
            finally:
                self._leave()

    def _put_in_order(self) -> None:
        content = _content(self._file, self.path)
        recording = parsed(content, self.path)
        last = len(self._order)
        ordered = sorted(recording.takes.values(), key=lambda take: self._order.get(take.key, last))
        recording.takes = {take.key: take for take in ordered}
        text = recording.text().encode()
        if text == content or not _is_at(self._file, self.path):
            return
        mode = stat.S_IMODE(os.fstat(self._file).st_mode)
        other = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as target:
                target.write(text)
                target.flush()
                os.fsync(target.fileno())
            other.chmod(mode)
            other.replace(self.path)
        finally:
            other.unlink(missing_ok=True)

    def _leave(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                if self._process == os.getpid():
                    _unlock(file)
            os.close(file)


def _opened(path: Path) -> int:
    """The file at ``path``, locked; made where there is none.

    Raises:
        ConfigError: it cannot be written, or another process records to it.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ConfigError(f"cannot be recorded to: {error.strerror}", file=path) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise ConfigError("cannot be recorded to: it is no file", file=path)
        try:
            _lock(file)
        except OSError:
            os.close(file)
            step = "record to another file, or say %llm live there first"
            raise ConfigError("another kernel records to it", file=path, next_step=step) from None
        if _is_at(file, path):  # else whoever had it has put another in its place just now
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    return os.path.samestat(os.fstat(file), there)


def _content(file: int, path: Path) -> bytes:
    size = os.fstat(file).st_size
    if size > MAX_BYTES:
        raise ConfigError(f"longer than {MAX_BYTES >> 20} MiB", file=path)
    os.lseek(file, 0, os.SEEK_SET)
    pieces, left = [], size
    while left and (piece := os.read(file, left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


_open: dict[tuple[int, str], Recorder] = {}
_open_guard = new_lock()


def recorder_at(path: Path, scrub: Scrub, *, overwrite: bool = False) -> Recorder:
    """The recorder of ``path``: one for all in this process. Each who asks for it says `leave` in the end.

    Raises:
        ConfigError: it cannot be recorded to, or holds something else.
    """
    key = (os.getpid(), os.path.realpath(path))
    with _open_guard:
        recorder = _open.get(key)
        if recorder is None:
            recorder = _open[key] = Recorder(Path(key[1]), scrub, overwrite=overwrite)
        elif overwrite:
            raise ConfigError("it is being recorded to", file=path, next_step="%llm live first")
        elif scrub.of_people:
            recorder.scrub.of_people = True
            recorder.tell(scrubbed=True)
        recorder.users += 1
        return recorder


def leave(recorder: Recorder) -> None:
    """Whoever got it from `recorder_at` needs it no longer; with the last one it is finished."""
    with _open_guard:
        recorder.users -= 1
        if recorder.users > 0:
            return
        for key in [key for key, each in _open.items() if each is recorder]:
            del _open[key]
    recorder.finish()
