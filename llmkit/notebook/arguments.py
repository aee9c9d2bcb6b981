"""What stands on the first line of a ``%%llm`` or ``%%llm_compare`` cell, checked before anything is sent."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.magic_arguments import MagicArgumentParser

from llmkit.call import CACHE_MODES, TIERS
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

__all__ = ["FORMATS", "CellLine", "GridLine", "parse", "parse_grid", "parser_of"]

FORMATS = ("markdown", "text", "json", "code", "html")
MOST_REPEATS = 100

DESCRIPTION = """%%llm [NAME <<] [options]

Ask a model; the rest of the cell is the prompt. The answer streams into the cell.
{{ name }} and {% … %} are filled in from the notebook's own variables (Jinja);
all other braces stay as they are.

Example:

    %%llm answer << -m gpt-5-mini -t 0 --max-cost 0.01
    What stands out in this table? {{ df.head() }}
"""

GRID_DESCRIPTION = """%%llm_compare [NAME <<] [options]

Ask one prompt of several models, at several temperatures, in several versions, all at once; the
rest of the cell is the prompt, and a template, as in %%llm. The answers stream in side by side;
cheapest and fastest are marked, and where they differ from the first. The variable holds a
DataFrame, one row an answer.

Example:

    %%llm_compare grid << -m gpt-5-mini,claude-haiku-4-5,local -t 0,0.7 --max-cost 0.01
    Explain backpressure in two sentences.
"""

_NAMED = re.compile(r"""\s*(?P<name>[^\s<"'-][^\s<]*)?\s*<<(?P<rest>.*)""", re.DOTALL)
_SINGLE_DASH_WORD = re.compile(r"-[A-Za-z][A-Za-z-]+[^\s]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CellLine:
    """A checked cell line.

    Attributes:
        names: variables that are to hold the reply.
        options: arguments of `llmkit.Client.stream`, as far as they were given.
        format: one of `FORMATS`; None where none was given.
        quiet: show nothing. stream: let the wire stream. raw: the prompt is no template.
        plan: send nothing, show what it would take.
        repeat: how many samples of the answer.
        chat: the conversation that this cell goes on with.
        schema: the name of a variable, or the short form. images: paths, URLs or expressions.
        save: the name under which the prompt is kept. saved: the prompt that was kept, ``NAME`` or ``NAME@VERSION``.
        help: show the options, ask nothing.
    """

    names: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    quiet: bool = False
    stream: bool = True
    raw: bool = False
    plan: bool = False
    repeat: int | None = None
    chat: str | None = None
    schema: str | None = None
    images: tuple[str, ...] = ()
    save: str | None = None
    saved: str | None = None
    help: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GridLine:
    """A checked line of a comparison.

    Attributes:
        cell: what it has in common with a ``%%llm`` cell; ``cell.repeat`` samples of each.
        models, temperatures: the sides of the grid; None where none are given. saved: versions of kept prompts.
    """

    cell: CellLine
    models: tuple[str, ...] | None = None
    temperatures: tuple[float, ...] | None = None
    saved: tuple[str, ...] = ()


class _Parser(MagicArgumentParser):
    """IPython's parser, with llmkit's errors."""

    @property
    def hint(self) -> str:
        return f"{self.prog}? shows every option with an example"

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise ConfigError(f"{self.prog}: {message}", next_step=self.hint)

    def converted(self, option: str, convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
        """``convert``, with an error in words: that ``option`` is ``what``."""

        def read(text: str) -> Any:
            try:
                return convert(text)
            except ValueError:
                raise ConfigError(f"{option} is {what}, not {text!r:.60}", next_step=self.hint) from None

        return read


def _seconds_or_preset(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a preset, or what `Options` refuses in its own words


def _escaped(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MOST_REPEATS:
        raise ValueError
    return number


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError
    return key, value


def _name(text: str) -> str:
    if not text.isidentifier() or iskeyword(text):
        raise ConfigError(f"{text!r:.60} cannot be the name of a variable", next_step="%%llm answer << …")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError
    return names


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _parser(prog: str, description: str) -> _Parser:
    parser = _Parser(prog, description=description)  # type: ignore[no-untyped-call]
    parser.allow_abbrev = False  # `--max` must not mean whatever begins so today
    return parser


def _with_options(parser: _Parser, without: frozenset[str] = frozenset()) -> _Parser:
    """``parser`` with the options of a cell, but those that are called as in ``without``."""
    converted = parser.converted

    def add(*flags: str, **how: Any) -> None:
        if flags[0] not in without:
            parser.add_argument(*flags, **how)

    add("-m", "--model", help="provider:model, an alias, or several with commas: a chain. -m gpt-5-mini,local")
    add("-s", "--system", help='system prompt; a template, too. -s "You are terse."')
    add("-o", "--output", metavar="NAME", help="variable for the reply, as NAME << does. -o answer")
    number = converted("-t", float, "a number")
    add("-t", "--temperature", type=number, help="0 to 2; 0 is the least random. -t 0.2")
    whole = converted("--max-tokens", int, "a whole number")
    add("--max-tokens", type=whole, metavar="N", help="most output tokens, reasoning included. --max-tokens 500")
    add("--max-cost", metavar="USD", help="what this cell may cost, all attempts together. --max-cost 0.01")
    seed = converted("--seed", int, "a whole number")
    add("--seed", type=seed, metavar="N", help="ask for repeatable sampling, where the model can. --seed 7")
    add(
        "--stop",
        type=_escaped,
        action="append",
        metavar="TEXT",
        help=r"end the answer here; may be repeated. --stop '\n'",
    )
    add("--user", help="whom the cost is booked for. --user ana")
    tag = converted("--tag", _tag, "KEY=VALUE")
    add(
        "--tag", type=tag, action="append", metavar="K=V", help="what it is booked for; may be repeated. --tag app=docs"
    )
    add(
        "--cache",
        choices=CACHE_MODES,
        help="use: a stored answer where there is one; refresh: ask anew, and store; off: neither look nor store; "
        "only: never ask. --cache refresh",
    )
    add("--tier", choices=TIERS, help="the model that is set for work of this kind in [tiers]. --tier simple")
    add("--chat", metavar="NAME", help="go on with this conversation; nothing is remembered without it. --chat trip")
    add(
        "--schema",
        metavar="NAME|DSL",
        help="the shape of the answer: a variable with a Pydantic class or a JSON schema, or fields in short. "
        "--schema 'name, age int, tags list'",
    )
    add(
        "--image",
        action="append",
        metavar="EXPR",
        help="a picture to look at: a path, a URL, or a variable; may be repeated. --image plot.png",
    )
    count = converted("--repeat", _count, f"a whole number from 1 to {MOST_REPEATS}")
    add("--repeat", type=count, metavar="N", help="so many samples of the answer, asked at once. --repeat 3")
    add("--plan", action="store_true", help="send nothing: show tokens, cost, route, budgets, cache. --plan")
    add("--save", metavar="NAME", help="keep this prompt under a name, as its next version. --save summary")
    add(
        "--with",
        metavar="NAME",
        dest="saved",
        help="begin with a prompt that was kept. --with summary, --with summary@2",
    )
    preset = "SECONDS|chat|code"
    add("--timeout", type=_seconds_or_preset, metavar=preset, help="time for the whole call. --timeout 20")
    add("--format", choices=FORMATS, help="how the answer is shown; HTML is shown as source, never run. --format json")
    add("--quiet", action="store_true", help="show nothing; errors still show. answer << --quiet")
    add("--no-stream", action="store_true", help="ask for the answer in one piece. --no-stream")
    add("--raw", action="store_true", help="no template: {{ and {%% stay as they are. --raw")
    add(
        "-h",
        "--help",
        action="store_true",
        help=f"show this, and ask nothing. %{parser.prog.replace('%', '%%')[1:]} --help",
    )
    return parser


# What a comparison has several of, has none of, or counts otherwise.
_NOT_AS_IN_A_CELL = frozenset(
    {"-m", "-t", "-o", "--tier", "--chat", "--schema", "--repeat", "--save", "--with", "--format", "--max-cost"}
)


def _grid_parser() -> _Parser:
    parser = _parser("%%llm_compare", GRID_DESCRIPTION)
    add, converted = parser.add_argument, parser.converted
    several = converted("-m", _names, "names with commas between")
    models = "several models with commas between; a chain goes by an alias. -m gpt-5-mini,local"
    add("-m", "--model", type=several, metavar="MODELS", help=models)
    numbers = converted("-t", _numbers, "numbers with commas between")
    add("-t", "--temperature", type=numbers, metavar="NUMBERS", help="several temperatures, 0 to 2 each. -t 0,0.7")
    add("-o", "--output", metavar="NAME", help="variable for the DataFrame, as NAME << does. -o grid")
    kept = converted("--with", _names, "names with commas between")
    versions = "prompts that were kept, or versions of one; may be repeated. --with summary@1,summary@2"
    add("--with", action="append", type=kept, metavar="NAMES", dest="saved", help=versions)
    count = converted("--repeat", _count, f"a whole number from 1 to {MOST_REPEATS}")
    add("--repeat", type=count, metavar="N", help="so many samples of each. --repeat 3")
    add("--max-cost", metavar="USD", help="what each answer may cost, all its attempts together. --max-cost 0.01")
    return _with_options(parser, _NOT_AS_IN_A_CELL)


_PARSER = _with_options(_parser("%%llm", DESCRIPTION))
_GRID_PARSER = _grid_parser()


def parser_of(magic: str) -> _Parser:
    """What reads the line of ``%%llm`` or ``%%llm_compare``, named without the percent signs."""
    return {"llm": _PARSER, "llm_compare": _GRID_PARSER}[magic]


def parse(line: str) -> CellLine:
    """Read the line.

    Raises:
        ConfigError: an unknown option (with the nearest one), a value of the wrong kind, a name that cannot be one.
    """
    names, given = _given(line, _PARSER)
    return _cell_line(names, vars(given))


def parse_grid(line: str) -> GridLine:
    """Read the line of a comparison. Raises as `parse`."""
    names, given = _given(line, _GRID_PARSER)
    said = vars(given)
    sides = {name: said.pop(name) for name in ("model", "temperature", "saved")}
    return GridLine(
        cell=_cell_line(names, said),
        models=None if sides["model"] is None else tuple(sides["model"]),
        temperatures=None if sides["temperature"] is None else tuple(sides["temperature"]),
        saved=tuple(name for names in sides["saved"] or () for name in names),
    )


def _given(line: str, parser: _Parser) -> tuple[tuple[str, ...], Namespace]:
    names, rest = _target(line, parser)
    words = _split(rest, parser)
    _refuse_unknown([word for word in words if _SINGLE_DASH_WORD.fullmatch(word)], parser)
    given, extra = parser.parse_known_args(words)
    _refuse_unknown(extra, parser)
    if given.output is not None:
        names += (_name(given.output),)
    return tuple(dict.fromkeys(names)), given


def _cell_line(names: tuple[str, ...], given: dict[str, Any]) -> CellLine:
    options = {
        name: given.get(name)
        for name in ("model", "system", "temperature", "max_tokens", "seed", "user", "cache", "tier")
    }
    options |= {"max_cost": given["max_cost"], "stop": given["stop"], "timeout": given["timeout"]}
    options["tags"] = dict(given["tag"]) if given["tag"] else None
    for dest in ("chat", "schema", "save", "saved"):
        option = "--with" if dest == "saved" else f"--{dest}"
        if isinstance(given.get(dest), str) and not given[dest].strip():  # said, and so not as if it were left out
            raise ConfigError(f"{option} is empty", next_step=f"give a name after {option}, or leave it out")
    return CellLine(
        names=names,
        options={name: value for name, value in options.items() if value is not None},
        format=given.get("format"),
        quiet=given["quiet"],
        stream=not given["no_stream"],
        raw=given["raw"],
        plan=given["plan"],
        repeat=given["repeat"],
        chat=given.get("chat"),
        schema=given.get("schema"),
        images=tuple(given["image"] or ()),
        save=given.get("save"),
        saved=given.get("saved"),
        help=given["help"],
    )


def _target(line: str, parser: _Parser) -> tuple[tuple[str, ...], str]:
    """The name before ``<<``, if there is one, and what follows."""
    match = _NAMED.fullmatch(line)
    if match is None:
        return (), line
    if match["name"] is None:
        raise ConfigError("<< needs the name of a variable before it", next_step=f"{parser.prog} answer << …")
    return (_name(match["name"]),), match["rest"]


def _split(text: str, parser: _Parser) -> list[str]:
    # Not IPython's arg_split: that one leaves the quotes on.
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"{parser.prog}: {str(error).lower()}", next_step='close the quotes; a quote itself is \\"'
        ) from None


def _refuse_unknown(words: Sequence[str], parser: _Parser) -> None:
    if not words:
        return
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        message = f"{parser.prog}: {words[0]!r:.60} is no option"
        raise ConfigError(message, next_step="the prompt begins on the next line; commands are %llm with one %")
    import difflib

    option = option.partition("=")[0]
    known = list(parser._option_string_actions)
    near = difflib.get_close_matches(option, known, 1) or difflib.get_close_matches(f"-{option}", known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{parser.prog}: there is no option {option:.60}{hint}", next_step=parser.hint)
