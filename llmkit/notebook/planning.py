"""``--plan``: what a cell would take and come to, in one block, and nothing is sent."""

from __future__ import annotations

import html
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.notebook.footer import escaped
from llmkit.plan import Section, count, in_lines, of_budgets, usd
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.client import AsyncClient
    from llmkit.comparison import Trial
    from llmkit.endpoint import Endpoint
    from llmkit.notebook.arguments import CellLine
    from llmkit.notebook.magics import LLMMagics
    from llmkit.notebook.question import Question
    from llmkit.plan import Plan, PlannedBudget

__all__ = ["Asked", "Totals", "as_html", "asked_of", "plan_all", "plan_of", "plan_trials", "publish", "totals"]

MOST_PARTS = 20
"""Expressions of a template that are shown, the dearest first."""

WRAPPED = 40
"""Characters above which a cell of a table may be broken into lines."""

_TABLE = "border-collapse: collapse; margin: 0 0 0.3em; font-variant-numeric: tabular-nums;"
_CELL = "padding: 0.1em 0.9em 0.1em 0; text-align: left; vertical-align: top; white-space: pre-wrap;"
_SHORT = "white-space: nowrap;"
_HEAD = "font-weight: normal; color: var(--jp-ui-font-color2, inherit);"
_BLOCK = (
    "font-family: var(--jp-ui-font-family, sans-serif); font-size: var(--jp-ui-font-size1, 0.85em); line-height: 1.6; "
    "overflow-x: auto;"
)


class Asked(NamedTuple):
    """One call of a cell, as it would be made: its prompt and options."""

    prompt: Any
    options: dict[str, Any]


def plan_of(magics: LLMMagics, said: CellLine, question: Question) -> None:
    """``%%llm --plan``: show it. ``_`` holds the plan, or a list of them; the cell's own variables stay as they are."""
    if said.repeat:
        from llmkit.notebook.comparing import samples_of

        plan_trials(magics, said, samples_of(magics.session.client, said, question).trials, question)
    else:
        _show(magics, said, [Asked(question.prompt, question.options)], question)


def plan_trials(magics: LLMMagics, said: CellLine, trials: Sequence[Trial], question: Question) -> None:
    """The same of several calls: of ``--repeat``, and of ``%%llm_compare``."""
    _show(magics, said, asked_of(trials), question)


def asked_of(trials: Sequence[Trial]) -> list[Asked]:
    """The calls of a comparison."""
    return [Asked(trial.version.prompt, trial.options) for trial in trials]


def _show(magics: LLMMagics, said: CellLine, asked: Sequence[Asked], question: Question) -> None:
    session = magics.session
    plans = session.portal.run(plan_all(session.client, asked))
    sections = shown(plans)
    if parts := session.portal.run(_parts(session.client, plans[0], question)):
        sections.append(parts)
    if notes := _unused(said):
        sections.append(Section("note", tuple((note,) for note in notes)))
    if not said.quiet:
        publish(sections)
    magics.bind(plans[0] if len(plans) == 1 else plans, ())


def publish(sections: Sequence[Section]) -> None:
    """Display a block: HTML where there is a page, text in a terminal."""
    from IPython.display import display

    display(  # type: ignore[no-untyped-call]
        {"text/plain": in_lines(sections), "text/html": as_html(sections)}, raw=True
    )


async def plan_all(client: AsyncClient, asked: Sequence[Asked], after: Sequence[Plan] = ()) -> list[Plan]:
    """The plans of calls that are made one after the other, or at once: each counts those before it."""
    plans: list[Plan] = []
    for each in asked:
        plans.append(await client.plan(each.prompt, after=(*after, *plans), **each.options))
    return plans


def _unused(said: CellLine) -> list[str]:
    """What the line asks for that does not happen now."""
    notes = []
    if said.save:
        notes.append(f"--save {tidy(said.save, limit=60)}: nothing is kept under --plan")
    if said.names:
        names = ", ".join(said.names)
        notes.append(
            f"{names} {'is' if len(said.names) == 1 else 'are'} left as {'it is' if len(said.names) == 1 else 'they are'}; _ holds the plan"
        )
    if said.chat:
        notes.append(f"--chat {tidy(said.chat, limit=60)}: what was said so far is in the tokens; no turn is added")
    return notes


# -- several calls -----------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Sums over plans; USD None where the price of one that would be asked is unknown."""

    calls: int
    asked: int
    cached: int
    refused: int
    input_tokens: int
    output_tokens: int
    expected_usd: Decimal | None
    worst_usd: Decimal | None


def totals(plans: Sequence[Plan], *, with_refused: bool = False) -> Totals:
    """What they come to together. What would be refused costs nothing, unless it is wanted as if it were not."""
    goes = [plan for plan in plans if with_refused or plan.refusal is None]
    cached, refused = sum(plan.cached for plan in plans), sum(plan.refusal is not None for plan in plans)
    return Totals(
        len(plans),
        len(plans) - cached - refused,
        cached,
        refused,
        sum(plan.input_tokens for plan in goes),
        sum(plan.output_tokens for plan in goes),
        _sum([plan.expected_usd for plan in goes]),
        _sum([plan.worst_usd for plan in goes]),
    )


def _sum(costs: Sequence[Decimal | None]) -> Decimal | None:
    return None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0))


def shown(plans: Sequence[Plan]) -> list[Section]:
    """The block of one plan; of several, a line for each and their sum."""
    if len(plans) == 1:
        return plans[0].sections()
    rows = tuple(_row(number, plan) for number, plan in enumerate(plans, 1))
    sums = totals(plans)
    refused = f", {sums.refused} would be refused" if sums.refused else ""
    verdict = f"{sums.calls} calls: {sums.asked} would be asked, {sums.cached} answered by the cache{refused}; nothing has been sent"
    tokens = f"{sums.input_tokens:,} in → ≈{sums.output_tokens:,} out"
    cost = f"{usd(sums.expected_usd, about=True)} expected, at most {usd(sums.worst_usd)} without retries"
    head = ("", "model", "tokens", "expected", "at most", "cache", "")
    found = [Section("plan", ((verdict,),)), Section("tokens", ((tokens,),)), Section("cost", ((cost,),))]
    found.append(Section("calls", rows, head))
    if limits := budgets_after(plans):
        found.append(of_budgets(limits))
    refusal = next((plan for plan in plans if plan.refusal is not None), None)
    if refusal is not None:
        found.append(Section("refused", refusal.sections()[0].rows))
    return found


def budgets_after(plans: Sequence[Plan]) -> list[PlannedBudget]:
    """Every limit over more than one call: before the first of them, and after all that would not be refused."""
    found: dict[tuple[str, str], PlannedBudget] = {}
    for plan in plans:
        for each in plan.budgets:
            if each.scope in {"request", "link"}:
                continue
            so_far = found.get((each.scope, each.unit)) or each._replace(
                after_expected=each.spent, after_worst=each.spent, refuses=False
            )
            if plan.refusal is None:
                so_far = so_far._replace(
                    after_expected=_with(so_far.after_expected, each.spent, each.after_expected),
                    after_worst=_with(so_far.after_worst, each.spent, each.after_worst),
                )
            found[each.scope, each.unit] = so_far._replace(refuses=so_far.refuses or each.refuses)
    return list(found.values())


def _with(sum_: Any, before: Any, after: Any) -> Any:
    """The sum and what one more call adds to it; None where that is unknown."""
    return None if sum_ is None or after is None else sum_ + after - before


def _row(number: int, plan: Plan) -> tuple[str, ...]:
    name = tidy(plan.link.endpoint if plan.link else plan.model, limit=100)
    tokens = "" if plan.refusal else f"{plan.input_tokens:,} → ≈{plan.output_tokens:,}"
    cost = (usd(plan.expected_usd, about=True), usd(plan.worst_usd))
    why = f"refused: {tidy(plan.refused_by or '', limit=60)}" if plan.refusal else ""
    return (f"{number}.", name, tokens, *cost, plan.cache, why)


# -- the template ------------------------------------------------------------------------------------------------------


def endpoint_of(client: AsyncClient, plan: Plan) -> Endpoint | None:
    """Where the plan's link goes."""
    name = plan.link.endpoint if plan.link else None
    return next((link.endpoint for link in client.config.route(plan.model) if link.endpoint.name == name), None)


async def _parts(client: AsyncClient, plan: Plan, question: Question) -> Section | None:
    """How many tokens each expression of the template takes, the dearest first."""
    from llmkit.models import tokens

    endpoint = endpoint_of(client, plan)
    if endpoint is None or not question.parts:
        return None
    counts = [(expression, await tokens.count(endpoint, text)) for expression, text in question.parts]
    counts.sort(key=lambda each: -each[1].tokens)
    rows = [
        (f"{{{{ {tidy(expression, limit=80)} }}}}", f"{'' if of.exact else '≈'}{count(of.tokens, 'tokens')}")
        for expression, of in counts[:MOST_PARTS]
    ]
    if len(counts) > MOST_PARTS:
        rest = sum(of.tokens for _, of in counts[MOST_PARTS:])
        rows.append((f"{len(counts) - MOST_PARTS} more", f"≈{count(rest, 'tokens')}"))
    return Section("template", tuple(rows), ("expression", "filled in"))


# -- as HTML -----------------------------------------------------------------------------------------------------------


def as_html(sections: Sequence[Section]) -> str:
    """The block as HTML that holds no script and no link; everything in it is escaped."""
    rows = "".join(_section(section) for section in sections)
    return f'<div style="{_BLOCK}"><table style="{_TABLE} border: none;"><tbody>{rows}</tbody></table></div>'


def _section(section: Section) -> str:
    if section.head:
        body = _table(section)
    else:
        body = "<br>".join("  ".join(escaped(cell, limit=1000) for cell in row) for row in section.rows)
    return f'<tr style="background: none;"><th style="{_CELL} {_HEAD}">{html.escape(section.name)}</th><td style="{_CELL}">{body}</td></tr>'


def _table(section: Section) -> str:
    head = "".join(f'<th style="{_CELL} {_HEAD}">{escaped(cell)}</th>' for cell in section.head)
    lines = "".join(
        '<tr style="background: none;">'
        + "".join(f'<td style="{_CELL} {_SHORT if len(cell) <= WRAPPED else ""}">{escaped(cell)}</td>' for cell in row)
        + "</tr>"
        for row in section.rows
    )
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
