"""How a comparison looks: a card for each answer, side by side, and a line for all; as HTML, and as text for terminals.

What a model or a server said is escaped, keeps its lines, and is cut where it is too long to be shown. Colours are those
of JupyterLab's theme where there is one; nothing is said by a colour alone.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from llmkit.money import money
from llmkit.notebook import footer
from llmkit.notebook.differences import Differences
from llmkit.notebook.formats import DOLLAR, plain
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmkit.comparison import Trial
    from llmkit.notebook.differences import Difference
    from llmkit.notebook.footer import Part

__all__ = ["Card", "as_html", "as_text", "ended", "growing", "summary"]

MOST_SHOWN = 20_000
"""Characters of one answer that are shown, and …"""
MOST_IN_ALL = 400_000
"""… of all of them together."""

_SHARED = {"cache", "coalesced"}
_NAMES = {"aborted": "interrupted", "not asked": "not asked"}


@dataclass(slots=True)
class Card:
    """One answer as it is shown.

    Attributes:
        title: the model. where: the rest of its place in the grid, in words.
        text: of the answer, not escaped. status: what goes on, or went wrong; empty where all is well.
        marks: what it is best at. footer: as under any answer. difference: from the first answer.
    """

    number: int
    title: str
    where: list[str]
    text: str
    status: str = ""
    warns: bool = False
    marks: list[str] = field(default_factory=list)
    footer: list[Part] = field(default_factory=list)
    difference: Difference | None = None


def growing(trials: Sequence[Trial], status: Callable[[Trial], str]) -> list[Card]:
    """The cards while answers arrive. ``status`` says of a trial that goes on what it does."""
    over = {"complete", "failed", "aborted"}
    return [
        Card(
            trial.number,
            *_place(trial, trials),
            text=trial.text,
            status=_status(trial) or "done" if trial.status in over else status(trial),
            warns=trial.status == "failed",
        )
        for trial in trials
    ]


def ended(trials: Sequence[Trial], *, timings: bool) -> list[Card]:
    """The cards of a comparison that is over; without ``timings`` they are the same each time the same happens."""
    cards = [Card(trial.number, *_place(trial, trials), text=trial.text) for trial in trials]
    for card, trial in zip(cards, trials, strict=True):
        card.status, card.warns = _status(trial), trial.status == "failed"
        if trial.reply is not None:
            card.footer = footer.of_reply(
                trial.reply, interrupted=trial.status == "aborted" and not trial.reply.cut, timings=timings
            )
            card.footer += footer.notes(trial.reply.call.trail.warnings)
        elif trial.attempts:
            card.footer = footer.of_attempts(trial.attempts, trial.latency_s or 0.0, timings=timings)
    _mark(cards, trials, timings=timings)
    _compare(cards, trials)
    return cards


def _place(trial: Trial, trials: Sequence[Trial]) -> tuple[str, list[str]]:
    where = []
    if trial.temperature is not None:
        where.append(f"temperature {trial.temperature:g}")
    if trial.version.name:
        where.append(tidy(trial.version.name, limit=100))
    if any(each.repeat for each in trials):
        where.append(f"sample {trial.repeat + 1}")
    return tidy(trial.model, limit=100), where


def _status(trial: Trial) -> str:
    if trial.status == "failed":
        return trial.reason or "failed"
    return _NAMES.get(trial.status, "") if trial.reply is None or not trial.text else ""


def _mark(cards: Sequence[Card], trials: Sequence[Trial], *, timings: bool) -> None:
    """Name the cheapest and the fastest of the whole answers, where they do not all tie; times tie that read the same.

    An answer that was not asked for now costs what it had cost then, and took no time that could be compared.
    """
    costs: dict[int, Decimal | float] = {}
    times: dict[int, Decimal | float] = {}
    read: dict[str, Callable[[Any], object]] = {"cheapest": Decimal, "fastest": footer.seconds}
    for trial in trials:
        reply = trial.reply
        if trial.status != "complete" or reply is None:
            continue
        shared = reply.source in _SHARED
        cost = reply.call.trail.saved if shared else reply.cost_usd
        if cost is not None:
            costs[trial.number] = cost
        if timings and not shared and reply.latency_s is not None:
            times[trial.number] = reply.latency_s
    for name, measured in (("cheapest", costs), ("fastest", times)):
        shown = {number: read[name](value) for number, value in measured.items()}
        if len(set(shown.values())) > 1:
            best = read[name](min(measured.values()))
            for number, value in shown.items():
                if value == best:
                    cards[number].marks.append(name)


def _compare(cards: Sequence[Card], trials: Sequence[Trial]) -> None:
    whole = [card for card, trial in zip(cards, trials, strict=True) if trial.status == "complete" and card.text]
    if len(whole) < 2:
        return
    first, *others = whole
    differences = Differences(first.text, f"answer {first.number + 1}")
    for card in others:
        card.difference = differences.of(card.text)


def summary(trials: Sequence[Trial], elapsed_s: float | None = None) -> list[Part]:
    """The line for all of them. ``elapsed_s`` from the first to the last."""
    numbers = {
        status: sum(trial.status == status for trial in trials)
        for status in ("complete", "failed", "aborted", "not asked")
    }
    names = {"complete": "whole", "failed": "failed", "aborted": "in part", "not asked": "not asked"}
    number = len(trials)
    parts = [footer.Part(f"{number} answer{'' if number == 1 else 's'}")]
    if numbers["complete"] < number:
        parts += [
            footer.Part(f"{count} {names[status]}", warns=status != "complete")
            for status, count in numbers.items()
            if count
        ]
    costs = [trial.cost_usd for trial in trials if trial.status != "not asked"]
    known = sum((cost for cost in costs if cost is not None), Decimal(0))
    unknown = sum(cost is None for cost in costs)
    parts.append(
        footer.Part(
            f"{money(known)} in all" if not unknown else f"{money(known)} and {unknown} of unknown cost",
            warns=bool(unknown),
        )
    )
    if elapsed_s is not None:
        parts.append(footer.Part(footer.seconds(elapsed_s)))
    return parts


# -- HTML --------------------------------------------------------------------------------------------------------------

_FONT = "font-family: var(--jp-ui-font-family, sans-serif); font-size: var(--jp-ui-font-size1, 0.85em);"
_LINE = "var(--jp-border-color1, rgba(128, 128, 128, 0.45))"
# As many columns as fit, none narrower than a line of text needs; in a narrow window they are stacked.
_GRID = (
    f"{_FONT} display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.6rem; "
    "margin: 0.2rem 0; line-height: 1.45;"
)
_CARD = f"border: 1px solid {_LINE}; border-radius: 4px; display: flex; flex-direction: column; min-width: 0;"
_HEAD = f"padding: 0.4rem 0.6rem; border-bottom: 1px solid {_LINE}; overflow-wrap: anywhere;"
_BODY = "padding: 0.5rem 0.6rem; overflow: auto; flex: 1 1 auto;"
# While it grows, a card grows up to a height, and then the end of the text stays in sight: nothing is ever less high than
# before, nor is there much room left that the end would take away.
_GROWING = "min-height: 3rem; max-height: 12rem; display: flex; flex-direction: column-reverse;"
_FIXED = "height: 2.9em; overflow: auto;"
_ENDED = "max-height: 24rem;"
_TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;"
_FOOT = f"padding: 0.3rem 0.6rem 0.4rem; border-top: 1px solid {_LINE};"
_FAINT = "color: var(--jp-ui-font-color2, inherit);"
_WARN = "color: var(--jp-error-color0, #b3261e); overflow-wrap: anywhere;"
_MARK = f"border: 1px solid {_LINE}; border-radius: 3px; padding: 0 0.35em; margin-left: 0.4em; font-weight: 600; white-space: nowrap;"
_ADDED = "text-decoration: underline; text-decoration-thickness: 2px; background: rgba(46, 160, 67, 0.22);"
_REMOVED = "text-decoration: line-through; background: rgba(218, 54, 51, 0.18); opacity: 0.8;"


def as_html(cards: Sequence[Card], line: Sequence[Part], *, live: bool = False) -> str:
    """The whole grid; everything in it is escaped."""
    room = _room(cards)
    busy = ' aria-busy="true"' if live else ""
    shown = "".join(_card(card, room, live=live) for card in cards)
    grid = f'<div style="{_GRID}" role="group" aria-label="comparison"{busy}>{shown}</div>'
    return grid + footer.as_html(line)


def _card(card: Card, room: int, *, live: bool) -> str:
    name = f"answer {card.number + 1}: {', '.join([card.title, *card.where])}"
    body = f"{_BODY} {_GROWING if live else _ENDED}"
    parts = [
        f'<div style="{_CARD}" role="group" aria-label="{_safe(name)}">',
        _head(card),
        # Reached by the keyboard, so that a long text can be scrolled without a mouse.
        f'<div style="{body}" tabindex="0" role="region" aria-label="{_safe(f"text of answer {card.number + 1}")}">',
        _body(card, room, live=live),
        "</div>",
    ]
    if live:
        parts.append(f'<div style="{_FOOT} {_FIXED}">{_said_of(card)}</div>')
    elif card.footer or card.difference:
        note = f'<div style="{_FAINT}">{_safe(card.difference.note)}</div>' if card.difference else ""
        parts.append(f'<div style="{_FOOT}">{note}{footer.as_html(card.footer) if card.footer else ""}</div>')
    return "".join([*parts, "</div>"])


def _head(card: Card) -> str:
    marks = "".join(f'<span style="{_MARK}">{_safe(mark)}</span>' for mark in card.marks)
    where = f'<div style="{_FAINT}">{_safe(" · ".join(card.where))}</div>' if card.where else ""
    return f'<div style="{_HEAD}">{card.number + 1}. <strong>{_safe(card.title)}</strong>{marks}{where}</div>'


def _body(card: Card, room: int, *, live: bool) -> str:
    text = _text(card, room, live=live)
    shown = f'<div style="{_TEXT}">{text}</div>' if text else ""
    if live:
        return f'<div style="margin-bottom: auto;">{shown}</div>'
    return shown + (_said_of(card) if card.status else "")


def _said_of(card: Card) -> str:
    style = _WARN if card.warns else f"{_FAINT} font-style: italic;"
    return f'<div style="{style}">{_safe(card.status)}</div>'


def _text(card: Card, room: int, *, live: bool) -> str:
    if live:
        return _escaped(card.text[-room:])
    if card.difference is not None and card.difference.pieces is not None and len(card.text) <= room:
        return "".join(_piece(piece.kind, piece.text) for piece in card.difference.pieces)
    more = len(card.text) - room
    rest = f'<div style="{_FAINT}">… and {more:,} characters more, in the variable</div>' if more > 0 else ""
    return _escaped(card.text[:room]) + rest


def _piece(kind: str, text: str) -> str:
    if kind == "same":
        return _escaped(text)
    tag, style = ("ins", _ADDED) if kind == "added" else ("del", _REMOVED)
    return f'<{tag} style="{style}">{_escaped(text)}</{tag}>'


def _room(cards: Sequence[Card]) -> int:
    """Characters that each card may show."""
    return min(MOST_SHOWN, MOST_IN_ALL // max(1, len(cards)))


def _safe(text: str) -> str:
    return _escaped(tidy(text, limit=600))


def _escaped(text: str) -> str:
    # A page that sets formulas would take what stands between two dollars for one.
    return html.escape(plain(text)).replace("\\", "<span>&#92;</span>").replace("$", DOLLAR)


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(cards: Sequence[Card], line: Sequence[Part]) -> str:
    """The same for a terminal: a table, and then the texts. Control characters are left out."""
    rows = [["", "model", "", ""]]
    for card in cards:
        about = [part.text for part in card.footer if not part.below] or [card.status]
        # Last, since it may differ from run to run: a column before it would be as wide as the longest.
        rows.append([str(card.number + 1), card.title, " · ".join(card.where), " · ".join([*about, *card.marks])])
    texts = [_said(card, _room(cards)) for card in cards]
    return plain("\n\n".join([_table(rows), *texts, footer.as_text(line)]))


def _said(card: Card, room: int) -> str:
    head = f"── {card.number + 1}. {' · '.join([card.title, *card.where])} " + "─" * 8
    more = len(card.text) - room
    lines = [head, card.text[:room].rstrip("\n")]
    lines.append(f"… and {more:,} characters more, in the variable" if more > 0 else "")
    lines += [card.status, f"({card.difference.note})" if card.difference else ""]
    lines += [part.text for part in card.footer if part.below]
    return "\n".join(each for each in lines if each)


def _table(rows: Sequence[Sequence[str]]) -> str:
    used = [at for at in range(len(rows[0])) if any(row[at] for row in rows)]
    widths = {at: max(len(row[at]) for row in rows) for at in used}
    return "\n".join("  ".join(row[at].ljust(widths[at]) for at in used).rstrip() for row in rows)
