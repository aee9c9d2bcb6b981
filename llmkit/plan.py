"""What a call would take and come to: tokens, cost, route, cache, budgets. Nothing of it has been sent.

A plan is plain data, made by `llmkit.planner`; ``print(plan)`` says it in one block, and ``pandas.DataFrame(plan.links)``
or ``(plan.budgets)`` are its tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from llmkit.money import amount, money
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llmkit.account import Sums
    from llmkit.errors import LLMKitError

__all__ = ["Expectation", "Plan", "PlannedBudget", "PlannedLink", "Section", "count", "in_lines", "of_budgets", "usd"]


class Expectation(NamedTuple):
    """How long an answer will be, in output tokens, and why.

    Attributes:
        basis: ``template`` or ``model``: the mean of the newest ``answers`` that prompts of the same template had from
            this model, or that any had, the shortest of ``lowest`` and the longest of ``highest`` tokens. ``max_tokens``:
            half of what is allowed. ``default``: nothing is known.
    """

    tokens: int
    basis: str
    answers: int = 0
    lowest: int | None = None
    highest: int | None = None

    @property
    def why(self) -> str:
        """In words."""
        if not self.answers:
            return (
                "half of --max-tokens" if self.basis == "max_tokens" else "a guess: nothing is known of this model yet"
            )
        one, is_other = self.answers == 1, self.basis != "template"
        answers = "as the one answer" if one else f"mean of the last {self.answers:,} answers"
        other = f", {'which was not' if one else 'none of them'} to this template" if is_other else ""
        spread = "" if self.lowest == self.highest else f", {self.lowest:,} to {self.highest:,}"
        return f"{answers} of this {'model' if is_other else 'template'}{other}{spread}"


class PlannedLink(NamedTuple):
    """One link of the route, and one attempt there. USD None: the price is unknown.

    Attributes:
        endpoint: ``provider:model``.
        use: ``asked`` first, ``fallback`` (asked if those before it fail) or ``skipped``; ``reason`` says why.
        input_tokens: as counted, or estimated (``is_exact`` False); ``most_input_tokens`` cannot be exceeded.
        expected: of the output. most_output_tokens: that the attempt may produce.
        expected_usd: of one whole answer. worst_usd: the most one attempt can cost, which is what budgets hold for it.
        attempts: how many there may be, the first one and its retries.
    """

    endpoint: str
    use: str
    reason: str | None
    input_tokens: int
    is_exact: bool
    most_input_tokens: int
    expected: Expectation
    most_output_tokens: int
    expected_usd: Decimal | None
    worst_usd: Decimal | None
    attempts: int


class PlannedBudget(NamedTuple):
    """One limit that the call counts towards, in USD or tokens, before it and after it.

    Attributes:
        scope: ``request``, ``link``, ``session``, ``day``, ``user ana, month`` …, as in `llmkit.BudgetExceeded.scope`.
        spent, held: before the call. after_expected, after_worst: what will have been spent; None: nobody knows.
        refuses: whether this limit refuses the call.
        resets_at: epoch seconds; None where it does not.
    """

    scope: str
    unit: str
    limit: Decimal | int
    spent: Decimal | int
    held: Decimal | int
    after_expected: Decimal | int | None
    after_worst: Decimal | int | None
    refuses: bool
    resets_at: float | None


class Section(NamedTuple):
    """A part of the block: lines, or a table with a head."""

    name: str
    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """What one call would take and come to. Made by `llmkit.Client.plan`.

    Attributes:
        model: as it was asked for.
        source: where the answer would come from: ``provider``, ``simulated``, ``cache``, ``degraded`` or ``recording``;
            None: it would be refused, with ``refusal``.
        cache: ``hit``; ``before``: one of the plans before it (``after``) will have stored the answer; ``miss``;
            ``refresh``: not looked for; ``off``: neither looked for nor stored.
        links: the route, in its order.
        budgets: every limit that the call counts towards.
        waits: what it would wait for; None where nothing is in its way.
        saved_usd: by the cache, where that answers; None where nobody knows.
        worst_in_all_usd: with every retry and every fallback there may be, within ``max_cost``.
        warnings: what would be said although it goes on.
        late_refusal: the scope that would refuse it if all the plans before it (``after``) came to their worst case.
    """

    model: str
    source: str | None
    cache: str = "miss"
    links: tuple[PlannedLink, ...] = ()
    budgets: tuple[PlannedBudget, ...] = ()
    refusal: LLMKitError | None = None
    waits: str | None = None
    saved_usd: Decimal | None = None
    worst_in_all_usd: Decimal | None = None
    warnings: tuple[str, ...] = ()
    late_refusal: str | None = None
    # What it does to those that come after it.
    stored_as: frozenset[str] = field(default=frozenset())
    settles: Mapping[str, tuple[Sums, Sums]] = field(default_factory=dict)

    @property
    def link(self) -> PlannedLink | None:
        """The link that is asked first; where none would be, the first one of the route."""
        asked = (link for link in self.links if link.use == "asked")
        return next(asked, self.links[0] if self.links else None)

    @property
    def cached(self) -> bool:
        """Whether the cache would answer."""
        return self.source == "cache"

    @property
    def input_tokens(self) -> int:
        """As counted, or estimated; 0 where nobody is asked."""
        return 0 if self.link is None or self._is_free_of_charge else self.link.input_tokens

    @property
    def output_tokens(self) -> int:
        """As expected; 0 where nobody is asked."""
        return 0 if self.link is None or self._is_free_of_charge else self.link.expected.tokens

    @property
    def expected_usd(self) -> Decimal | None:
        """What it will cost if all goes well. What would be refused is given as if it were not."""
        return Decimal(0) if self._is_free_of_charge else self.link and self.link.expected_usd

    @property
    def worst_usd(self) -> Decimal | None:
        """The most that its first attempt can cost: what is held for it."""
        return Decimal(0) if self._is_free_of_charge else self.link and self.link.worst_usd

    @property
    def refused_by(self) -> str | None:
        """The scope of the budget that refuses it, or the kind of error; None where nothing does."""
        if self.refusal is None:
            return None
        scope = getattr(self.refusal, "scope", None)
        return scope if isinstance(scope, str) else type(self.refusal).__name__

    @property
    def _is_free_of_charge(self) -> bool:
        return self.source in {"cache", "degraded", "recording"}

    # -- in words ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = tidy(self.link.endpoint if self.link else self.model, limit=100)
        if self.refusal is not None:
            return f"<Plan {name} refused: {tidy(self.refused_by or '', limit=60)}>"
        if self.source == "recording":
            return f"<Plan {name} from the recording>"
        if self.cached:
            return f"<Plan {name} from the cache, saves {usd(self.saved_usd)}>"
        tokens = f"{self.input_tokens:,} → ≈{self.output_tokens:,} tokens"
        return f"<Plan {name} {tokens}, {usd(self.expected_usd, about=True)}, at most {usd(self.worst_usd)}>"

    def __str__(self) -> str:
        """All of it, as a block of text; safe for a terminal."""
        return in_lines(self.sections())

    def sections(self) -> list[Section]:
        """The block in its parts. No control characters in them; not escaped."""
        found = [Section("plan", ((self._verdict(),),)), *self._tokens(), *self._money()]
        if self.links:
            found.append(Section("cache", ((self._cache(),),)))
        if self.links:
            rows = tuple(_route_row(number, link, self.cached) for number, link in enumerate(self.links, 1))
            found.append(Section("route", rows, ("", "model", "tokens", "expected", "at most", "attempts", "")))
        if self.budgets:
            found.append(of_budgets(self.budgets))
        if notes := [*self.warnings, *([f"waits: {self.waits}"] if self.waits else [])]:
            found.append(Section("note", tuple((tidy(note, limit=300),) for note in notes)))
        return found

    def _verdict(self) -> str:
        if self.refusal is not None:
            step = self.refusal.next_step
            return tidy(f"would be refused: {self.refusal.message}" + (f" ({step})" if step else ""), limit=600)
        if self.source == "cache":
            return "the cache answers; nothing would be sent"
        if self.source == "recording":
            return "the recording answers; nothing would be sent (%llm live asks for real)"
        if self.source == "degraded":
            return "no model can be asked now: the text set for that would be the answer ([degraded])"
        return (
            f"{tidy(self.link.endpoint if self.link else self.model, limit=100)} would be asked; nothing has been sent"
        )

    def _tokens(self) -> Iterator[Section]:
        link = self.link
        if link is None:
            return
        about = "" if link.is_exact else "≈"
        given = f"{about}{link.input_tokens:,} in (at most {link.most_input_tokens:,})"
        yield Section(
            "tokens",
            (
                (f"{given} → ≈{link.expected.tokens:,} out (at most {link.most_output_tokens:,})",),
                (f"output: {link.expected.why}",),
            ),
        )

    def _money(self) -> Iterator[Section]:
        if self._is_free_of_charge or self.link is None:
            yield Section("cost", (("$0",),))
            return
        if self.worst_usd is None:
            yield Section("cost", (("unknown: no price is known",),))
            return
        text = f"{usd(self.expected_usd, about=True)} expected, at most {usd(self.worst_usd)} an attempt"
        if self.worst_in_all_usd is not None and self.worst_in_all_usd > self.worst_usd:
            text += f"; {usd(self.worst_in_all_usd)} with every retry and fallback"
        yield Section("cost", ((text,),))

    def _cache(self) -> str:
        return {
            "hit": f"answers, saves {usd(self.saved_usd)}",
            "before": f"answers what was asked before, saves {usd(self.saved_usd, about=True)}",
            "refresh": "is not looked into; the answer is stored (refresh)",
            "off": "is neither looked into nor written to",
        }.get(self.cache, "has no answer to this")


def of_budgets(budgets: Sequence[PlannedBudget]) -> Section:
    """How far each limit is used, before and after."""
    head = ("scope", "limit", "spent", "held", "after, expected", "after, worst", "")
    return Section("budgets", tuple(_budget_row(each) for each in budgets), head)


def usd(value: Decimal | None, *, about: bool = False) -> str:
    """USD in words; ``about`` marks what is expected and not certain."""
    if value is None:
        return "?"
    return f"{'≈' if about and value else ''}{money(value)}"


def count(value: Decimal | int | None, unit: str, *, whole: bool = False) -> str:
    """An amount of ``usd`` or ``tokens`` in words; ``whole``: as it was set, to its last digit."""
    if value is None:
        return "?"
    if unit == "tokens":
        return f"{value:,} token{'' if value == 1 else 's'}"
    return (amount if whole else money)(Decimal(value))


def _route_row(number: int, link: PlannedLink, is_cached: bool) -> tuple[str, ...]:
    name = tidy(link.endpoint, limit=100)
    why = "" if link.reason is None else tidy(link.reason, limit=200)
    if link.use == "skipped":
        return (f"{number}.", name, "", "", "", "", f"skipped: {why}")
    tokens = f"{'' if link.is_exact else '≈'}{link.input_tokens:,} → ≈{link.expected.tokens:,}"
    first = "if the cache had no answer" if is_cached else "asked first"
    use = first if link.use == "asked" else why or "if those before it fail"
    attempts = f"up to {link.attempts}" if link.attempts > 1 else "1"
    return (f"{number}.", name, tokens, usd(link.expected_usd, about=True), usd(link.worst_usd), attempts, use)


def _budget_row(each: PlannedBudget) -> tuple[str, ...]:
    unit = each.unit
    return (
        tidy(each.scope, limit=60),
        count(each.limit, unit, whole=True),
        count(each.spent, unit),
        count(each.held, unit),
        count(each.after_expected, unit),
        count(each.after_worst, unit),
        "refuses" if each.refuses else "",
    )


def in_lines(sections: Sequence[Section]) -> str:
    """Sections as a block of text, their names in a column of their own."""
    lines = []
    for section in sections:
        rows = [section.head, *section.rows] if section.head else list(section.rows)
        for at, line in enumerate(_aligned(rows)):
            lines.append(f"{'' if at else section.name:<10}{line}".rstrip())
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows with their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
