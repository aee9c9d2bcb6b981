"""``%llm why`` and ``%llm show``: what one call went through, and what it was answered."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llmkit.call import Attempt
from llmkit.errors import ConfigError
from llmkit.money import money
from llmkit.notebook.footer import as_html, as_text
from llmkit.notebook.formats import bundle, plain
from llmkit.notebook.life import Moment, after, attempt, counts
from llmkit.redaction import tidy
from llmkit.reply import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.notebook.kept import Kept
    from llmkit.notebook.magics import LLMMagics

__all__ = ["show", "why"]

MOST_CANDIDATES = 8
_QUESTION = 100
_LAST = 50  # of the newest calls of all kernels, in which this one's last is looked for
_LONGEST_ID = 200


# -- why ---------------------------------------------------------------------------------------------------------------


def why(magics: LLMMagics, words: list[str]) -> None:
    """Print the life of one call.

    Raises:
        ConfigError: there is no such call, or there are several.
    """
    beginning = _one(words, "%llm why [REQUEST_ID]")
    request_id = _last_call(magics) if beginning is None else _named(magics, beginning)
    if request_id is None:
        raise ConfigError("no call has been made yet", next_step="%%llm asks; %llm calls lists the newest")
    print(_life(magics, request_id))


def _life(magics: LLMMagics, request_id: str) -> str:
    ledger = magics.session.client.ledger
    row = next((each for each in ledger.calls(beginning=request_id) if each["request_id"] == request_id), None)
    kept = magics.session.history.of(request_id)
    started = row["started"] if row is not None else kept.started if kept is not None else 0.0
    lines = [f"call {tidy(request_id, limit=_LONGEST_ID)}, {_when(started)}", *_asked(row, kept)]
    made = [] if row is None else ledger.attempts(request_id)
    moments: Sequence[Moment] = kept.life if kept is not None else ()
    if not moments:
        moments = [Moment(each["started"] - started, tidy(attempt(_attempt(each)), limit=400)) for each in made]
    lines += [f"  {moment.at:6.2f} s  {moment.text}" for moment in moments]
    return "\n".join([*lines, *_ended(row, kept)])


def _asked(row: dict[str, Any] | None, kept: Kept | None) -> list[str]:
    lines = []
    if row is not None:
        tags = "".join(f", {tidy(key, limit=60)}={tidy(value, limit=60)}" for key, value in row["tags"].items())
        lines.append(f"  asked for {tidy(row['model'])}" + (f" by {tidy(row['user'])}" if row["user"] else "") + tags)
    elif kept is not None:
        lines.append(f"  asked for {tidy(kept.model)}")
    if kept is not None and kept.question:
        lines.append(f"  question: {tidy(kept.question, limit=_QUESTION)}")
    return lines


def _ended(row: dict[str, Any] | None, kept: Kept | None) -> list[str]:
    lines = []
    if row is None:
        lines.append("  the ledger has no row of it")
    else:
        parts = [f"  {row['status'].replace('_', ' ')}{after(row['latency_s'])}", *counts(_usage(row))]
        if row["status"] != "in_flight":
            parts.append("cost unknown" if row["cost_usd"] is None else money(row["cost_usd"]))
        if row["source"] not in {None, "provider"}:
            parts.append(f"answered by: {row['source']}")
        if row["error"] and row["status"] != "aborted":
            parts.append(f"{row['error']}: {tidy(row['message'] or '', limit=200)}".removesuffix(": "))
        lines.append(", ".join(parts))
    if kept is None:
        lines.append("  not asked by a cell, or not kept any longer: the above is what the ledger knows")
    elif not kept.is_whole:
        arrived = f"{len(kept.answer):,} characters of the answer are kept" if kept.answer else "no answer came"
        lines.append(f"  {tidy(kept.ending, limit=40)}; {arrived}: %llm show")
    elif kept.footer:
        lines.append(f"  shown as: {as_text([part for part in kept.footer if not part.below])}")
    return lines


def _attempt(row: dict[str, Any]) -> Attempt:
    known = {field.name: row[field.name] for field in fields(Attempt) if field.name in row}
    return Attempt(**{**known, "status": row["status"].replace("_", " "), "usage": _usage(row)})


def _usage(row: dict[str, Any]) -> Usage | None:
    if row["output_tokens"] is None:
        return None
    return Usage(row["input_tokens"] or 0, row["output_tokens"], estimated=bool(row["estimated"]))


# -- show --------------------------------------------------------------------------------------------------------------


def show(magics: LLMMagics, words: list[str]) -> None:
    """Show an answer again, as it was shown; or forget them all.

    Raises:
        ConfigError: there is no such answer, or there are several.
    """
    history = magics.session.history
    beginning = _one(words, "%llm show [REQUEST_ID] or %llm show clear")
    if beginning == "clear":
        removed = magics.session.forget_answers()
        print(f"llmkit: {removed:,} {'answer is' if removed == 1 else 'answers are'} removed from {history.location}")
        return
    request_id = history.last or history.newest() if beginning is None else _named(magics, beginning)
    kept = None if request_id is None else history.of(request_id)
    if request_id is None:
        raise ConfigError("no cell of this or another notebook has been answered yet", next_step=_WHAT_IS_KEPT)
    if kept is None:
        text = f"the text of call {tidy(request_id, limit=_LONGEST_ID)} was not kept"
        raise ConfigError(
            text, next_step=f"%llm why {tidy(request_id, limit=_LONGEST_ID)} tells its life; {_WHAT_IS_KEPT}"
        )
    if hasattr(magics.shell, "kernel"):
        _publish(kept)
    else:
        _print(kept)


_WHAT_IS_KEPT = "cells' answers are kept, not those of calls from Python, where [notebook] keep allows it"


def _publish(kept: Kept) -> None:
    from IPython.display import publish_display_data

    if kept.answer:
        about = {"llmkit": kept.about["llmkit"]} if "llmkit" in kept.about else {}
        publish_display_data(bundle(kept.answer, kept.form), about)  # type: ignore[no-untyped-call]
    if kept.footer:
        lines = {"text/html": as_html(kept.footer), "text/plain": plain(as_text(kept.footer))}
        publish_display_data(lines)  # type: ignore[no-untyped-call]
    if kept.error:
        print(plain(kept.error))


def _print(kept: Kept) -> None:
    parts = [kept.answer and bundle(kept.answer, kept.form)["text/plain"], as_text(kept.footer), kept.error]
    print("\n\n".join(plain(part).strip("\n") for part in parts if part))


# -- which call --------------------------------------------------------------------------------------------------------


def _one(words: list[str], usage: str) -> str | None:
    if len(words) > 1:
        raise ConfigError(f"{words[1]!r:.60} has no place here", next_step=f"write {usage}")
    return words[0] if words else None


def _last_call(magics: LLMMagics) -> str | None:
    """The last call of this kernel; where it has made none, the last of all."""
    from llmkit.state.owner import current_owner

    rows = magics.session.client.ledger.calls(limit=_LAST)
    mine = [row for row in rows if row["owner"] == current_owner()] or rows
    return str(mine[-1]["request_id"]) if mine else magics.session.history.newest()


def _named(magics: LLMMagics, beginning: str) -> str:
    """The one call whose id begins so."""
    beginning = beginning[:_LONGEST_ID]
    rows: list[dict[str, Any]] = magics.session.client.ledger.calls(beginning=beginning, limit=MOST_CANDIDATES + 1)
    started: dict[str, float] = {row["request_id"]: row["started"] for row in rows}
    found = dict.fromkeys([*started, *magics.session.history.find(beginning, MOST_CANDIDATES + 1)])
    if beginning in found:
        return beginning
    if not found:
        raise ConfigError(
            f"there is no such call: no id begins with {beginning!r:.60}", next_step="%llm calls lists the newest"
        )
    if len(found) == 1:
        return next(iter(found))
    names = [tidy(each, limit=80) + (f" ({_when(started[each])})" if each in started else "") for each in found]
    listed = ", ".join([*names[:MOST_CANDIDATES], *(["…"] if len(names) > MOST_CANDIDATES else [])])
    raise ConfigError(f"several calls begin with {beginning!r:.60}: {listed}", next_step="give more of the id")


def _when(started: float) -> str:
    try:
        return f"{datetime.fromtimestamp(started).astimezone():%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # a store may say anything
        return "at an unknown time"
