"""What Tab offers on the lines of ``%%llm`` and ``%llm``, and inside the braces of a prompt.

It is asked by one more matcher of IPython's completer (`llmkit.notebook.registration.complete`), as the terminal and every
kernel's frontend ask that one. Elsewhere it offers nothing, so all other completion is as it was. It never reaches for the network, and where a file takes long to be read
it offers what was known before.
"""

from __future__ import annotations

import os
import re
import threading
import time
from inspect import getattr_static
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmkit.config import PRESETS, WINDOWS
from llmkit.notebook import arguments, forms

if TYPE_CHECKING:
    from argparse import Action
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from llmkit.notebook.magics import LLMMagics

__all__ = ["MOST", "Completer", "Offer"]

FRESH_S = 30.0
"""How long what was read from a file is offered without looking again."""
PATIENCE_S = 0.15
"""A look that takes longer goes on without anybody waiting for it."""
MOST = 500
"""Of what is offered at once."""
MOST_FILES = 2_000  # of a folder

_CELL = re.compile(r"\s*%%(llm(?:_compare)?)(?!\w)")
_LINE = re.compile(r"\s*(?:[\w., ]+=\s*)?%llm(?!\w)(?P<rest>.*)", re.DOTALL)
_WORD = re.compile(r"[^\W\d]\w*(?:\.\w*)*$|\Z")


class Offer(NamedTuple):
    """What Tab offers: ``words`` in the place of ``fragment``, which stands before the cursor."""

    fragment: str
    words: list[str]
    kind: str = "magic"


class Completer:
    """What is offered where, in one shell."""

    def __init__(self, magics: LLMMagics) -> None:
        self._magics = magics
        self._lists = _Lists()

    def of(self, text: str, line: int, column: int) -> Offer | None:
        """What may stand at the cursor of a cell; None where that is not llmkit's to say. Never fails.

        Args:
            text: of the whole cell. line, column: of the cursor, from 0.
        """
        try:
            return self._of(text, line, column)
        except Exception:  # noqa: BLE001 - settings may be wrong, files may be damaged: then nothing is offered
            return None

    def _of(self, text: str, line: int, column: int) -> Offer | None:
        lines = text.split("\n")
        before = lines[line][:column]
        first = next((index for index, each in enumerate(lines) if each.strip()), 0)
        cell = _CELL.match(lines[first])
        if cell is None:
            match = _LINE.fullmatch(before)
            return None if match is None else self._command(match["rest"])
        if line == first:
            return self._options(cell[1], before[cell.end() :]) if len(before) > cell.end() else None
        return self._variables("\n".join([*lines[first + 1 : line], before]))

    # -- the line of a cell ------------------------------------------------------------------------------------------

    def _options(self, magic: str, before: str) -> Offer | None:
        if before.count('"') % 2 or before.count("'") % 2:
            return None  # inside quotes stands the user's own text
        parser = arguments.parser_of(magic)
        _, _, after = before.rpartition("<<")
        words = after.split(" ") if after.strip() else [""]
        fragment, earlier = words[-1], [word for word in words[:-1] if word]
        options: Mapping[str, Action] = parser._option_string_actions
        name, equals, value = fragment.partition("=")
        if equals and name in options:
            return self._values(options[name], value)
        previous = options.get(earlier[-1]) if earlier else None
        if previous is not None and previous.nargs != 0:
            return self._values(previous, fragment)
        return Offer(fragment, _matching(_unused(parser._actions, earlier), fragment))

    def _values(self, action: Action, fragment: str) -> Offer | None:
        if action.choices:
            return Offer(fragment, _matching(map(str, action.choices), fragment))
        look: Callable[[], Iterable[str]] | None = {
            "model": self._models,
            "chat": lambda: self._magics.chats.names,
            "schema": self._schemas,
            "saved": self._prompts,
            "save": self._prompts,
            "output": lambda: self._names(""),
            "timeout": lambda: PRESETS,
        }.get(action.dest)
        if action.dest == "image":
            return Offer(fragment, _paths(fragment))
        if look is None:
            return None
        if action.dest in {"model", "saved"}:
            fragment = fragment.rpartition(",")[2]
        return Offer(fragment, _matching(look(), fragment))

    # -- the line of a command ---------------------------------------------------------------------------------------

    def _command(self, rest: str) -> Offer | None:
        from llmkit.notebook.commands import commands

        if not rest[:1].isspace():
            return None
        words = rest.split(" ")
        fragment, earlier = words[-1], [word for word in words[:-1] if word]
        if not earlier:
            return Offer(fragment, _matching(commands(), fragment))
        command = commands().get(earlier[0])
        if command is None:
            return None
        written = [form for form, _ in command.forms if form]
        found: list[str] = []
        for slot in forms.following(written, earlier[1:]):
            found += _matching(slot.words, fragment)
            if slot.kind:
                offered, fragment = self._inserted(earlier[0], slot.kind, fragment)
                found += offered
        return Offer(fragment, list(dict.fromkeys(found)))

    def _inserted(self, command: str, kind: str, fragment: str) -> tuple[list[str], str]:
        """What may be put in for a word in capitals, and which part of the word at the cursor it replaces."""
        if kind in {"PATH", "NOTEBOOK"}:
            return _paths(fragment), fragment
        if kind in {"MODEL", "ENDPOINT"}:
            fragment = fragment.rpartition(",")[2]
        look: Callable[[], Iterable[str]] | None = {
            "MODEL": self._models,
            "ENDPOINT": self._models,
            "REQUEST_ID": self._ids,
            "TOPIC": _topics,
            "NAME=AMOUNT": _limits,
            "NAME=off": _limits,
            "NAME": {"chat": lambda: self._magics.chats.names, "prompts": self._prompts}.get(command),
        }.get(kind)
        return ([] if look is None else _matching(look(), fragment)), fragment

    # -- the text of a cell ------------------------------------------------------------------------------------------

    def _variables(self, before: str) -> Offer | None:
        opened = max(before.rfind("{{"), before.rfind("{%"))
        if opened < 0 or max(before.rfind("}}"), before.rfind("%}")) > opened:
            return None
        inside = before[opened + 2 :]
        match = _WORD.search(inside)
        fragment = match[0] if match else ""
        if "." in fragment:
            return Offer(fragment, _attributes(self._magics.shell.user_ns, fragment), "instance")
        if inside.removesuffix(fragment).rstrip().endswith("|"):
            from llmkit.notebook.sandbox import environment

            return Offer(fragment, _matching(environment().filters, fragment), "function")
        return Offer(fragment, _matching(self._names(fragment), fragment), "instance")

    def _names(self, fragment: str) -> Iterator[str]:
        """The user's own variables."""
        shell = self._magics.shell
        for name in list(shell.user_ns):
            if name not in shell.user_ns_hidden and (not name.startswith("_") or fragment.startswith("_")):
                yield name

    # -- lists -------------------------------------------------------------------------------------------------------

    def _schemas(self) -> list[str]:
        """Variables that hold a Pydantic class, or what looks like a JSON schema."""
        names = self._magics.shell.user_ns
        return [name for name in self._names("") if _is_schema(names[name])]

    def _models(self) -> list[str]:
        config, session = self._magics.session.config, self._magics.session
        links = [link.endpoint.name for links in config.aliases().values() for link in links]
        ready = [
            entry.name
            for entry in config.providers.values()
            if not entry.key_required or (entry.api_key_env and config.environ.get(entry.api_key_env))
        ]
        prefixes = [name if name == "simulator" else f"{name}:" for name in ready]
        asked = self._lists.get("models", session.models_asked)
        return [*config.aliases(), *links, *asked, *prefixes]

    def _ids(self) -> list[str]:
        history = self._magics.session.history
        return self._lists.get("ids", lambda: history.find("", 20))

    def _prompts(self) -> list[str]:
        prompts = self._magics.session.prompts
        return self._lists.get("prompts", lambda: [kept.name for kept in prompts])


class _Lists:
    """What has to be looked up in files: in a thread, so that a slow disk holds nobody up."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._looking: dict[str, threading.Thread] = {}

    def get(self, what: str, look: Callable[[], Iterable[str]]) -> list[str]:
        """What ``look`` finds, or found the last time."""
        known = self._known.get(what)
        if known is None or time.monotonic() - known[0] >= FRESH_S:
            thread = self._looking.get(what)
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._look, args=(what, look), daemon=True, name="llmkit-completion")
                self._looking[what] = thread
                thread.start()
            thread.join(PATIENCE_S)
        return self._known.get(what, (0.0, []))[1]

    def _look(self, what: str, look: Callable[[], Iterable[str]]) -> None:
        try:
            found = [each for each in look() if each.isprintable()]
        except Exception:  # noqa: BLE001 - a file that cannot be read offers nothing
            found = []
        self._known[what] = (time.monotonic(), list(dict.fromkeys(found)))


def _matching(words: Iterable[str], fragment: str) -> list[str]:
    """Those that begin so, each once; what holds a space or a control character could not stand on a line."""
    found = (word for word in words if word.startswith(fragment) and word.isprintable() and " " not in word)
    return list(dict.fromkeys(found))


def _unused(actions: Iterable[Action], words: list[str]) -> Iterator[str]:
    """The options that may still be given: each once, but those that may be repeated."""
    for action in actions:
        again = type(action).__name__ == "_AppendAction"
        if again or not any(word.partition("=")[0] in action.option_strings for word in words):
            yield from sorted(action.option_strings, key=len, reverse=True)


def _is_schema(value: object) -> bool:
    if isinstance(value, type):
        return any("model_json_schema" in vars(each) for each in value.__mro__)
    return type(value) is dict and bool({"properties", "$ref", "anyOf", "enum", "items"} & value.keys())


def _attributes(names: Mapping[str, object], fragment: str) -> list[str]:
    """What may follow the last dot, keys of a dict included, as a template finds them. Runs no property's code."""
    *path, last = fragment.split(".")
    value = names[path[0]]
    for name in path[1:]:
        value = value[name] if type(value) is dict and name in value else getattr_static(value, name)
        if hasattr(type(value), "__get__"):
            return []
    found = [key for key in value if type(key) is str and key.isidentifier()] if type(value) is dict else []
    shown = (name for name in [*found, *dir(value)] if last.startswith("_") or not name.startswith("_"))
    return _matching((".".join([*path, name]) for name in shown), fragment)


def _limits() -> list[str]:
    return [*(f"{name}=" for name in ("request", *WINDOWS)), "user.", "tag.", "model.", "at_limit=", "warn_at="]


def _topics() -> list[str]:
    from llmkit.notebook.manual import topics

    return topics()


def _paths(fragment: str) -> list[str]:
    """Files and folders whose path begins so."""
    folder, name = os.path.split(fragment)
    try:
        with os.scandir(Path(folder).expanduser() if folder else ".") as entries:
            found = [
                os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                for entry in islice(entries, MOST_FILES)
                if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
            ]
    except OSError:
        return []
    return sorted(each for each in found if " " not in each and each.isprintable())
