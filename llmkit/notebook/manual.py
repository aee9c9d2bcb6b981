"""``%llm help``: everything that can be said in a cell, from the very tables that read it.

Commands say their own forms and examples (`llmkit.notebook.commands`), options theirs (`llmkit.notebook.arguments`);
what is neither has a text here. The tables of ``docs/notebook.md`` are made of the same.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import ConfigError
from llmkit.notebook import arguments

if TYPE_CHECKING:
    from argparse import Action
    from collections.abc import Callable, Iterator, Sequence

    from llmkit.notebook.magics import LLMMagics

__all__ = [
    "COLUMN",
    "Option",
    "documented",
    "examples",
    "help_text",
    "lines",
    "options",
    "run",
    "text_of",
    "topics",
    "usage",
]

COLUMN = 32
WIDTH = 66  # of what stands beside it: together they fit a cell of a window that is 1,000 pixels wide
MAGICS = ("llm", "llm_compare")

_BESIDE = (
    ("%%llm", "a prompt cell; %%llm? shows its options"),
    ("%%llm_compare", "one prompt over models, temperatures and versions; %%llm_compare? shows its options"),
    ("%config LLMMagics", "the settings of all cells"),
    ("%reload_ext llmkit", "read llmkit.toml and the environment again"),
)

TEXTS = {
    "templates": """A prompt is a template over the notebook's variables; only {{ … }} and {% … %} are syntax.

{{ df.head() }} puts in what a variable holds, as text that is never scanned again. A missing
name is an error before anything is sent. {{ df | table(20) }} writes so many rows as a table,
{{ obj | json }} an object as JSON. Code and JSON pass as they are; --raw turns templates off.
Tab completes variables and filters; --plan shows what each takes.

%%llm
Which of these looks wrong? {% for row in rows %}
- {{ row.name }}: {{ row.value }}{% endfor %}""",
    "variables": """A name and << before the options put the reply into a variable, as -o does; _ holds it, too.

%%llm answer << -t 0

str(answer) is the text; answer.json() the parsed object, answer.data the validated one
(--schema); answer.usage, answer.cost_usd, answer.attempts say what it took, answer.request_id
is its key in the ledger (%llm why, %llm show).""",
    "chats": """Nothing is remembered between cells, unless --chat NAME asks for it.

A cell that is run again takes its turn anew: the chat goes on from there, and later turns are
left out (%llm chat NAME undo brings them back). A cell that fails or is interrupted adds no
turn. -s in a later cell replaces the system prompt from that turn on. A chat lives in the
kernel.

%%llm --chat trip
Where to in the spring?

%llm chat trip""",
    "settings": """Settings come from llmkit.toml (or [tool.llmkit] in pyproject.toml), then LLMKIT_* variables,
then %config LLMMagics, then the line of the cell; the later wins. A bare %config LLMMagics
lists what can be set there.

%config LLMMagics.temperature = 0
%llm use gpt-5-mini,local
%llm budget day=2usd""",
    "errors": """An error is one short block: what happened, what was spent, what to do next. The cell fails, so
"Run all" stops. What had arrived is kept: in the variable, and for %llm show. %llm why tells
what the call went through.

%config LLMMagics.traceback = True""",
}


class Option(NamedTuple):
    """One option of a cell, in words.

    Attributes:
        form: as it is written, with what it takes. what: a sentence. examples: of the line of a cell.
    """

    form: str
    what: str
    examples: tuple[str, ...]


def options(magic: str) -> list[Option]:
    """The options of ``%%llm`` or ``%%llm_compare``, in their order."""
    return [_option(action, magic) for action in arguments.parser_of(magic)._actions]


def _option(action: Action, magic: str) -> Option:
    formatter = arguments.parser_of(magic)._get_formatter()
    what, _, shown = formatter._expand_help(action).rpartition(". ")
    taken = "" if action.nargs == 0 else f" {_metavar(action)}"
    return Option(", ".join(action.option_strings) + taken, what, tuple(re.split(r", (?=-)", shown)))


def _metavar(action: Action) -> str:
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()


def usage(magic: str) -> str:
    """All that the line of ``%%llm`` or ``%%llm_compare`` may say, with an example of each option."""
    rows = []
    for option in options(magic):
        rows.append((f"  {option.form}", option.what))
        if option.form not in option.examples:  # which then says nothing more
            rows.append(("", f"e.g. {', '.join(option.examples)}"))
    return f"{(arguments.parser_of(magic).description or '').strip()}\n\nOptions:\n\n{lines(rows)}\n"


def documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``%%llm?``, or the one of that name, show every option."""
    function.__doc__ = usage("llm_compare" if function.__name__ == "compare" else "llm")
    return function


# -- topics ------------------------------------------------------------------------------------------------------------


def run(_: LLMMagics, words: list[str]) -> None:
    """Print the list, or what there is to say of one topic.

    Raises:
        ConfigError: there is no such topic, with the nearest one.
    """
    if len(words) > 1:
        raise ConfigError(f"{words[1]!r:.60} has no place here", next_step="write %llm help [TOPIC]")
    print(text_of(words[0]) if words else help_text())


def help_text() -> str:
    """Every command, a line or two each."""
    from llmkit.notebook.commands import commands

    forms = [form for command in commands().values() for form in command.forms]
    more = f"%llm help TOPIC says more: a command, an option (--schema), or\n{', '.join(TEXTS)}"
    return f"{lines([*forms, *_BESIDE])}\n\n{more}"


def topics() -> list[str]:
    """All that ``%llm help`` knows."""
    from llmkit.notebook.commands import commands

    names = (
        name for magic in MAGICS for action in arguments.parser_of(magic)._actions for name in action.option_strings
    )
    return list(dict.fromkeys([*commands(), *TEXTS, *(name for name in names if name.startswith("--")), *_magics()]))


def _magics() -> list[str]:
    return [f"%%{magic}" for magic in MAGICS]


def text_of(topic: str) -> str:
    """What there is to say of one topic.

    Raises:
        ConfigError: there is no such topic, with the nearest one.
    """
    from llmkit.notebook.commands import commands

    name = topic.removeprefix("%llm ").strip()
    command = commands().get(name)
    if command is not None:
        return lines(command.forms) + (f"\n\n{command.more}" if command.more else "")
    if name in TEXTS:
        return TEXTS[name]
    if name.lstrip("%") in MAGICS:
        return usage(name.lstrip("%"))
    found = list(_of_option(name))
    if found:
        return "\n\n".join(found)
    import difflib

    known = topics()
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(f"--{name.lstrip('-')}", known, 1)
    hint = f"; did you mean %llm help {near[0]}?" if near else ""
    raise ConfigError(f"there is no topic {name!r:.60}{hint}", next_step="%llm help lists them all")


def _of_option(name: str) -> Iterator[str]:
    """What ``name`` means in each of the magics that have it, once where it is the same."""
    told: list[str] = []
    for magic in MAGICS:
        for action in arguments.parser_of(magic)._actions:
            if not {name, f"--{name}"} & set(action.option_strings):
                continue
            option = _option(action, magic)
            said = f"{option.form}\n{option.what}"
            if said not in told:
                told.append(said)
                shown = (each if each.startswith("%") else f"%%{magic} {each}" for each in option.examples)
                yield "\n".join([f"%%{magic} {said}", "", *shown])


def examples(text: str) -> list[str]:
    """The lines of a text of help that could be run: those that begin with ``%llm``, ``%%llm`` or the like."""
    found = (re.match(r"(%%?llm\S*(?: \S+)*?)(?:  .*)?$", line) for line in text.split("\n"))
    return [match[1] for match in found if match is not None]


def lines(forms: Sequence[tuple[str, str]]) -> str:
    """Forms and what they do, in two columns."""
    return "\n".join(line for form, what in forms for line in _columns(form, what))


def _columns(form: str, what: str) -> Iterator[str]:
    first, *more = textwrap.wrap(what, WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    if len(form) <= COLUMN - 2:
        yield f"{form:<{COLUMN}}{first}".rstrip()
    else:
        yield from (form, f"{'':<{COLUMN}}{first}")
    yield from (f"{'':<{COLUMN}}{each}" for each in more)
