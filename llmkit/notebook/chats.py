"""Conversations of a notebook: ``%%llm --chat NAME`` goes on with one, and nothing is remembered without it.

A turn knows which cell asked it. A cell that is run again takes its turn anew, and what had been said after it is left
out; so the same cells, run again from the top, are the same conversation, whatever was run in between. A cell that is
not answered adds nothing. Where nobody says which cell asks (a terminal, a notebook that is run without a frontend),
each question is a new turn.

A conversation lives in the kernel, and ends with it or when llmkit is unloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.call import Message
from llmkit.errors import ConfigError, ContextTooLong
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.notebook.magics import LLMMagics
    from llmkit.reply import Reply

__all__ = ["Chat", "Chats", "Place", "Turn", "chat", "here", "with_next_step"]

_NAME = re.compile(r"[^\W_][\w.:-]{0,63}")
_FIRST_WORDS = 60
USAGE = "%llm chat, %llm chat NAME, %llm chat NAME undo or %llm chat NAME clear"


class Place(NamedTuple):
    """Who asks: the cell, by the frontend's id of it, and which run of it; None where nobody says."""

    cell: str | None = None
    run: str | None = None


NOWHERE = Place()


def here(shell: Any) -> Place:
    """The cell that runs just now."""
    try:
        parent = shell.get_parent()
        cell, run = parent["metadata"].get("cellId"), parent["header"].get("msg_id")
    except (AttributeError, KeyError, TypeError, LookupError):  # a terminal; or a kernel of another kind
        return NOWHERE
    return Place(cell if isinstance(cell, str) and cell else None, run if isinstance(run, str) else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question and its answer.

    Attributes:
        asked: the user's messages, pictures and all. answer: the text.
        system: the system prompt in force; None where there is none.
        place: which cell asked. tokens: in and out, the conversation up to here included; None where nobody knows.
    """

    asked: tuple[Message, ...]
    answer: str
    system: str | None = None
    place: Place = NOWHERE
    tokens: int | None = None

    @property
    def messages(self) -> list[Message]:
        return [*self.asked, Message("assistant", self.answer)]


@dataclass(slots=True)
class Chat:
    """One conversation. ``before``: its turns before the last one took the place of others; None where it took none."""

    turns: list[Turn] = field(default_factory=list)
    before: list[Turn] | None = None

    def kept(self, place: Place) -> int:
        """How many turns come before the one that ``place`` is going to take."""
        for index, turn in enumerate(self.turns):
            if place.cell is not None and turn.place.cell == place.cell:
                # A loop that asks several times within one run of a cell asks one turn after the other.
                return len(self.turns) if turn.place.run == place.run and place.run is not None else index
        return len(self.turns)


class Chats:
    """The conversations of one shell, by name."""

    def __init__(self) -> None:
        self._chats: dict[str, Chat] = {}

    @property
    def names(self) -> list[str]:
        return list(self._chats)

    def get(self, name: str) -> Chat | None:
        return self._chats.get(name)

    def clear(self, name: str) -> int | None:
        """Forget it; how many turns it had, and None where there was none."""
        chat = self._chats.pop(name, None)
        return None if chat is None else len(chat.turns)

    def messages(self, name: str, prompt: str | Sequence[Message], place: Place = NOWHERE) -> list[Message]:
        """The whole question: what was said before, and ``prompt``. Changes nothing.

        Raises:
            ConfigError: that is no name.
        """
        _check(name)
        chat = self._chats.get(name) or Chat()
        said = [message for turn in chat.turns[: chat.kept(place)] for message in turn.messages]
        return [*said, *_asked(prompt)]

    def system(self, name: str, place: Place = NOWHERE) -> tuple[bool, str | None]:
        """Whether something was said before, and the system prompt that was in force then."""
        chat = self._chats.get(name) or Chat()
        before = chat.turns[: chat.kept(place)]
        return (True, before[-1].system) if before else (False, None)

    def notes(self, name: str | None, place: Place) -> list[str]:
        """What is to be said below an answer whose turn takes the place of others; ``name`` None: there is no chat."""
        chat = self._chats.get(name or "") or Chat()
        kept = chat.kept(place)
        later = len(chat.turns) - kept - 1
        if later < 1:
            return []
        turns = f"{later} later turn{' is' if later == 1 else 's are'} left out"
        back = "it" if later == 1 else "them"
        return [f"the chat {name} goes on from turn {kept + 1}; {turns} (%llm chat {name} undo brings {back} back)"]

    def add(self, name: str, messages: str | list[Message], reply: Reply, place: Place, system: str | None) -> None:
        """An answer has come, whole, to what `messages` gave."""
        if reply.source == "degraded" or isinstance(messages, str):
            return  # not the model's words; or not a question of this chat
        before = len(self.messages(name, (), place))
        chat = self._chats.setdefault(name, Chat())
        usage = reply.usage
        turn = Turn(
            asked=tuple(messages[before:]),
            answer=reply.text,
            system=system,
            place=place,
            tokens=None if usage is None else usage.total_tokens,
        )
        kept = chat.kept(place)
        chat.before = list(chat.turns) if kept < len(chat.turns) else None
        chat.turns[kept:] = [turn]

    def undo(self, name: str) -> int | None:
        """Bring back what the last turn left out; how many turns there are then, and None where it left out none."""
        chat = self._chats.get(name)
        if chat is None or chat.before is None:
            return None
        chat.turns, chat.before = chat.before, None
        return len(chat.turns)


def _asked(prompt: str | Sequence[Message]) -> list[Message]:
    return [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        step = "letters, digits, dot, dash, colon and underscore, at most 64: --chat trip"
        raise ConfigError(f"{name!r:.80} cannot be the name of a chat", next_step=step)


def with_next_step(error: BaseException, name: str | None) -> None:
    """Let an error about a prompt that is too long for the model say how to make the chat ``name`` shorter."""
    if name is None:
        return
    for each in (error, *getattr(error, "errors", ())):
        if isinstance(each, ContextTooLong):
            each.next_step = f"%llm chat {name} clear begins it anew; or use a model with a larger window"


# -- %llm chat ---------------------------------------------------------------------------------------------------------


def chat(magics: LLMMagics, words: list[str]) -> None:
    """List the conversations; show one; forget one.

    Raises:
        ConfigError: there is none of that name, or not with these words.
    """
    chats = magics.chats
    name, action = (*words, "", "")[:2]
    if len(words) > 2 or action not in {"", "clear", "undo"}:
        raise ConfigError(f"%llm chat {' '.join(words)[:60]}?", next_step=f"write {USAGE}")
    if not name:
        print(_listed(chats))
        return
    known = chats.get(name)
    if known is None:
        raise ConfigError(f"there is no chat {name!r:.60}", next_step=_there_are(chats))
    if action == "clear":
        turns = chats.clear(name) or 0
        print(f"llmkit: the chat {name} is forgotten, {turns} turn{'' if turns == 1 else 's'}")
    elif action == "undo":
        back = chats.undo(name)
        if back is None:
            raise ConfigError(f"the last turn of {name} left out none", next_step="%llm chat lists what there is")
        print(f"llmkit: the chat {name} has {back} turns again")
    else:
        print(_shown(known))


def _there_are(chats: Chats) -> str:
    names = ", ".join(chats.names[:10])
    return f"there are {names}" if names else "%%llm --chat NAME begins one"


def _listed(chats: Chats) -> str:
    if not chats.names:
        return "no chat yet; %%llm --chat NAME begins one, and %llm chat NAME shows it"
    rows = [("chat", "turns", "tokens", "begins with")]
    for name in chats.names:
        known = chats.get(name)
        assert known is not None
        tokens = known.turns[-1].tokens if known.turns else 0
        first = tidy(known.turns[0].asked[-1].text, limit=_FIRST_WORDS) if known.turns else ""
        rows.append((name, str(len(known.turns)), "?" if tokens is None else f"{tokens:,}", first))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{wide[0]}}  {turns:>{wide[1]}}  {tokens:>{wide[2]}}  {first}".rstrip()
        for name, turns, tokens, first in rows
    )


def _shown(known: Chat) -> str:
    from llmkit.notebook.formats import plain

    lines: list[str] = []
    system: str | None = None
    for number, turn in enumerate(known.turns, 1):
        if turn.system != system:
            lines += [f"system: {plain(turn.system or 'none any longer')}", ""]
            system = turn.system
        asked = "\n".join(message.text + _others(message) for message in turn.asked)
        lines += [f"{number}. you: {plain(asked)}", "", f"   model: {plain(turn.answer)}", ""]
    return "\n".join(lines).rstrip()


def _others(message: Message) -> str:
    """What of the message is not text."""
    parts = [] if isinstance(message.content, str) else [p for p in message.content if p.get("type") != "text"]
    return f" [{len(parts)} picture{'' if len(parts) == 1 else 's'}]" if parts else ""
