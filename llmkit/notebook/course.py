"""``%llm plan NOTEBOOK.ipynb``: all cells of a notebook, planned one after the other, and nothing is sent or run.

The lines that set something (``%llm use``, ``%llm budget``, ``%llm cache``, ``%config LLMMagics.…``) are followed
where they stand, as they are written. Prompts are filled in from the variables of this kernel.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.call import Message
from llmkit.errors import ConfigError, LLMKitError, TemplateError
from llmkit.notebook import budgets
from llmkit.notebook.arguments import parse, parse_grid
from llmkit.notebook.cells import Cell, read
from llmkit.notebook.chats import Place
from llmkit.notebook.missing import missing, present
from llmkit.notebook.planning import Asked, asked_of, budgets_after, plan_all, publish, totals
from llmkit.plan import Section, of_budgets, usd
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from llmkit.client import AsyncClient
    from llmkit.notebook.arguments import CellLine
    from llmkit.notebook.cells import Line
    from llmkit.notebook.magics import LLMMagics
    from llmkit.notebook.question import Question
    from llmkit.plan import Plan

__all__ = ["COLUMNS", "Row", "run"]

USAGE = "%llm plan NOTEBOOK.ipynb; for a single cell: %%llm --plan"
FIRST_WORDS = 60
MOST_CALLS = 2_000
"""Calls of one notebook that are planned; a loop in its cells is no cell."""

COLUMNS = {
    "cell": "int64",
    "prompt": "string",
    "model": "string",
    "calls": "int64",
    "cached": "int64",
    "input_tokens": "Int64",
    "output_tokens": "Int64",
    "expected_usd": "float64",
    "worst_usd": "float64",
    "refused_by": "string",
    "missing": "string",
    "error": "string",
}
"""Of the DataFrame. ``cell`` is its place in the notebook, from 1; USD and tokens are of all its calls; of a cell with
``missing`` names they are too low. ``refused_by`` counts the cells before it as they are expected to come out."""


class Row(NamedTuple):
    """One cell that asks, and what its calls come to."""

    cell: int
    prompt: str
    plans: tuple[Plan, ...] = ()
    missing: tuple[str, ...] = ()
    error: str | None = None

    def record(self) -> tuple[Any, ...]:
        """In the order of `COLUMNS`."""
        sums = totals(self.plans, with_refused=True)
        refused = dict.fromkeys(plan.refused_by for plan in self.plans if plan.refused_by)
        models = dict.fromkeys(plan.link.endpoint if plan.link else plan.model for plan in self.plans)
        error = self.error is not None
        return (
            self.cell,
            self.prompt,
            ", ".join(models) or None,
            sums.calls,
            sums.cached,
            None if error else sums.input_tokens,
            None if error else sums.output_tokens,
            None if error or sums.expected_usd is None else float(sums.expected_usd),
            None if error or sums.worst_usd is None else float(sums.worst_usd),
            ", ".join(refused) or None,
            ", ".join(self.missing) or None,
            self.error,
        )

    def shown(self) -> tuple[str, ...]:
        """The same as a line of a table in a terminal."""
        sums, at_least = totals(self.plans, with_refused=True), "≥" if self.missing else ""
        if self.error is not None:
            return (str(self.cell), self.prompt, "", "", "", "", "", f"cannot be planned: {self.error}")
        said = [f"refused: {self.record()[9]}"] if sums.refused else []
        said += [f"{sums.cached} of {sums.calls} cached" if sums.calls > 1 else "cached"] if sums.cached else []
        said += [f"not defined: {', '.join(self.missing)}"] if self.missing else []
        tokens = f"{at_least}{sums.input_tokens:,} → ≈{sums.output_tokens:,}"
        cost = (at_least + usd(sums.expected_usd, about=not at_least), at_least + usd(sums.worst_usd))
        return (str(self.cell), self.prompt, self.record()[2] or "", str(sums.calls), tokens, *cost, "; ".join(said))


def run(magics: LLMMagics, words: list[str]) -> pd.DataFrame | None:
    """Show the plan of a notebook, a row a cell. `_` holds them as a DataFrame.

    Raises:
        ConfigError: no name was given, or the file cannot be read.
    """
    if len(words) != 1:
        raise ConfigError("which notebook?" if not words else f"{words[1]!r:.60} has no place here", next_step=USAGE)
    course = _Course(magics)
    for item in read(words[0]):
        course.take(item)
    frame = _frame(course.rows)
    is_page = hasattr(magics.shell, "kernel")
    publish(_sections(tidy(words[0], limit=200), course, with_cells=not is_page))
    if is_page:
        return frame
    magics.bind(frame, ())
    return None


class _Course:
    """What has been said and planned so far, from the top of the notebook."""

    def __init__(self, magics: LLMMagics) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._magics = magics
        self._client: AsyncClient = magics.session.client.for_plans()
        self._settings = magics._settings()
        self._plans: list[Plan] = []
        self._chats: dict[str, tuple[list[Message], str | None]] = {}
        self._names: dict[str, Any] = magics.shell.user_ns
        self._stores = True
        self._open: str | None = None  # the conversation that the cell goes on with

    def take(self, item: Cell | Line) -> None:
        """The next cell, or line; what is wrong with it is said, and the others go on."""
        if isinstance(item, Cell):
            self._cell(item)
            return
        try:
            self._follow(item)
        except LLMKitError as error:
            self.notes.append(f"cell {item.number}: %{tidy(f'{item.name} {item.words}', limit=80)}: {error.message}")

    # -- what lines set ----------------------------------------------------------------------------------------------

    def _follow(self, line: Line) -> None:
        if line.name == "reload_ext":
            if line.words.split()[:1] == ["llmkit"]:
                self._client = self._magics.session.client.for_plans(self._magics.session.config)
                self._chats, self._stores = {}, True
            return
        if line.name == "config":
            self._config(line.words)
            return
        from llmkit.notebook.commands import split

        name, *words = split(line.words) or [""]
        if name == "use" and words:
            self._set("model", ",".join("".join(words).split(",")))
        elif name == "budget" and words:
            limits = self._client.config.budget
            self._client.set_budgets(**(budgets.lifted(limits) if words == ["off"] else budgets.read(words)))
        elif name == "cache" and words in (["off"], ["on"]):
            self._stores = words == ["on"]

    def _config(self, words: str) -> None:
        target, equals, value = words.partition("=")
        owner, _, name = target.strip().partition(".")
        if owner != "LLMMagics" or not equals or name not in self._magics._AS_OPTIONS:
            return
        try:
            self._set(name, ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ConfigError("only a value that stands there is followed; no code is run") from None

    def _set(self, name: str, value: Any) -> None:
        from llmkit.options import Options

        if value in {None, ""}:
            self._settings.pop(name, None)
            return
        Options.of({name: value})
        if name == "model":
            self._client.config.route(value)
        self._settings.pop({"model": "tier", "tier": "model"}.get(name, ""), None)
        self._settings[name] = value

    # -- what cells ask ----------------------------------------------------------------------------------------------

    def _cell(self, cell: Cell) -> None:
        self._open = None
        words = tidy(next((line for line in cell.body.splitlines() if line.strip()), ""), limit=FIRST_WORDS)
        try:
            lacking, asked = self._asked(cell)
            if not asked:
                return
            if len(self._plans) + len(asked) > MOST_CALLS:
                raise ConfigError(f"a notebook of more than {MOST_CALLS:,} calls is not planned")
            plans = self._magics.session.portal.run(plan_all(self._client, asked, self._plans))
            self._answered(plans[-1])
        except LLMKitError as error:
            self.rows.append(Row(cell.number, words, error=f"{type(error).__name__}: {tidy(error.message, limit=200)}"))
            return
        self._plans += plans
        self.rows.append(Row(cell.number, words, tuple(plans), tuple(lacking)))

    def _asked(self, cell: Cell) -> tuple[list[str], list[Asked]]:
        """The names that are missing, and the calls that the cell makes; none where it makes none."""
        from llmkit.notebook.comparing import grid_of, samples_of

        if cell.magic == "llm":
            said = parse(cell.line)
            if said.help or said.plan:
                return [], []
            question, lacking = self._question(said, cell)
            if said.repeat:
                return lacking, asked_of(samples_of(self._client, said, question).trials)
            return lacking, [Asked(question.prompt, question.options)]
        if cell.magic == "llm_compare":
            sides = parse_grid(cell.line)
            if sides.cell.help or sides.cell.plan:
                return [], []
            found = [self._question(replace(sides.cell, saved=name), cell) for name in sides.saved or [None]]
            names = list(dict.fromkeys(name for _, each in found for name in each))
            return names, asked_of(grid_of(self._client, sides, [question for question, _ in found]).trials)
        raise ConfigError(f"%%{cell.magic[:40]} is not planned in this version")

    def _question(self, said: CellLine, cell: Cell) -> tuple[Question, list[str]]:
        """What the cell asks, as far as it can be filled in, and the names that are missing for it."""
        try:
            return self._made(said, cell), []
        except TemplateError as error:
            kept = self._magics.session.prompts.get(said.saved) if said.saved else None
            texts = [kept.text, cell.body] if kept is not None and not kept.raw else [cell.body]
            texts += [text for text in (said.options.get("system"), self._settings.get("system")) if text]
            lacking = sorted({name for text in texts for name in missing(text, self._names)})
            if not lacking:
                raise
            if kept is not None:
                raise TemplateError(error.message, name=error.name, next_step=error.next_step) from None
        options = dict(said.options)
        if "system" in options:
            options["system"] = present(options["system"], self._names) or " "
        body = present(cell.body.strip("\n"), self._names)
        question = self._made(
            replace(said, raw=True, options=options), cell._replace(body=body if body.strip() else "…")
        )
        question.options["template"] = cell.body.strip("\n").rstrip()
        return question, lacking

    def _made(self, said: CellLine, cell: Cell) -> Question:
        question = self._magics.question(said, cell.body, {}, settings=self._settings, place=Place(cell.id))
        if not self._stores:
            question.options["cache"] = "only" if question.options.get("cache") == "only" else "off"
        return self._in_chat(said, question) if said.chat else question

    def _in_chat(self, said: CellLine, question: Question) -> Question:
        """With what the cells before it will have said in the same conversation."""
        assert said.chat is not None
        messages: list[Message] = [each for each in question.prompt if isinstance(each, Message)]
        options = dict(question.options)
        if said.chat in self._chats:
            before, system = self._chats[said.chat]
            messages = [*before, messages[-1]]
            if "system" not in said.options and system is not None:
                options["system"] = system
        self._chats[said.chat] = (messages, options.get("system"))
        self._open = said.chat
        return replace(question, prompt=list(messages), options=options)

    def _answered(self, plan: Plan) -> None:
        """The conversation, if the cell is of one, has an answer of the length that was expected."""
        if self._open is not None:
            words = " word" * (plan.link.expected.tokens if plan.link else 0)
            self._chats[self._open][0].append(Message("assistant", words))


# -- what is shown -----------------------------------------------------------------------------------------------------


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame.from_records([row.record() for row in rows], columns=list(COLUMNS))
    return frame.astype(COLUMNS)


def _sections(name: str, course: _Course, *, with_cells: bool) -> list[Section]:
    rows, plans = course.rows, [plan for row in course.rows for plan in row.plans]
    sums = totals(plans)
    cells = f"{len(rows)} cell{'' if len(rows) == 1 else 's'}"
    parts = [
        f"{cells} of {name}",
        f"{sums.calls} call{'' if sums.calls == 1 else 's'}",
        f"{sums.cached} answered by the cache",
    ]
    parts += [f"{sums.refused} would be refused"] if sums.refused else []
    verdict = f"{', '.join(parts)}; nothing has been sent or run"
    at_least = any(row.missing or row.error for row in rows)
    worst = f"{'at least' if at_least else 'at most'} {usd(sums.worst_usd)}{' in the worst case' if at_least else ''}"
    cost = f"{usd(sums.expected_usd, about=True)} expected, {worst}, without retries"
    tokens = f"{sums.input_tokens:,} in → ≈{sums.output_tokens:,} out"
    found = [
        Section("plan", ((verdict,),)),
        Section("tokens", ((f"at least {tokens}" if at_least else tokens,),)),
        Section("cost", ((f"at least {cost}" if at_least else cost,),)),
    ]
    if with_cells and rows:
        head = ("cell", "prompt", "model", "calls", "tokens", "expected", "at most", "")
        found.append(Section("cells", tuple(row.shown() for row in rows), head))
    if limits := budgets_after(plans):
        found.append(of_budgets(limits))
    if notes := [*_of_rows(rows), *course.notes]:
        found.append(Section("note", tuple((tidy(note, limit=300),) for note in notes)))
    return found


def _of_rows(rows: Sequence[Row]) -> list[str]:
    """What should be known of single cells."""
    notes = []
    for row in rows:
        if row.error is not None:
            notes.append(f"cell {row.cell} cannot be planned: {row.error}")
        if row.missing:
            names = ", ".join(row.missing)
            notes.append(
                f"cell {row.cell}: not defined in this kernel: {names}; its tokens and cost are counted without"
            )
        if late := dict.fromkeys(plan.late_refusal for plan in row.plans if plan.late_refusal):
            notes.append(
                f"cell {row.cell}: {', '.join(late)} would refuse it if the cells before came to their worst case"
            )
    return notes
