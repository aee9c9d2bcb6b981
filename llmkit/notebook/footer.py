"""What stands under an answer: a line of who answered, what it took, what it cost, and what went on before; and below
it, a line each, what its reader should know of money although nothing failed.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.money import money
from llmkit.notebook.formats import DOLLAR
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from decimal import Decimal

    from llmkit.call import Attempt
    from llmkit.reply import Reply, Usage

__all__ = [
    "Part",
    "as_html",
    "as_text",
    "escaped",
    "metadata",
    "notes",
    "of_attempts",
    "of_reply",
    "seconds",
    "status_html",
]


class Part(NamedTuple):
    """One piece of the line; ``warns`` where it should be seen, ``below`` where it is a line of its own."""

    text: str
    warns: bool = False
    below: bool = False


# JupyterLab's own variables, so that it fits light and dark; elsewhere the page's colour, a little fainter.
_STYLE = (
    "font-family: var(--jp-ui-font-family, sans-serif); font-size: var(--jp-ui-font-size1, 0.85em); line-height: 1.6;"
)
_FAINT = "color: var(--jp-ui-font-color2, inherit);"
_WARN = "color: var(--jp-warn-color0, #b36b00); font-weight: 600;"


def as_text(parts: Sequence[Part]) -> str:
    """The lines as plain text; not escaped."""
    return "\n".join(" · ".join(part.text for part in line) for line in _lines(parts))


def as_html(parts: Sequence[Part]) -> str:
    """The lines as HTML; everything in it is escaped."""
    lines = (" · ".join(_piece(part) for part in line) for line in _lines(parts))
    return f'<div style="{_STYLE} {_FAINT}">{"<br>".join(lines)}</div>'


def _lines(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    if line := [part for part in parts if not part.below]:
        yield line
    yield from ([part] for part in parts if part.below)


def _piece(part: Part) -> str:
    return f'<span style="{_WARN}">{escaped(part.text)}</span>' if part.warns else escaped(part.text)


def status_html(text: str) -> str:
    """What goes on while there is no answer yet."""
    return f'<div style="{_STYLE} {_FAINT} font-style: italic;">{escaped(text)}</div>'


def escaped(text: str, *, limit: int = 500) -> str:
    """Text as HTML: on one line, at most ``limit`` long, and nothing in it is a tag or the end of a formula."""
    # A page that sets formulas would take what stands between two amounts for one.
    return html.escape(tidy(text, limit=limit)).replace("\\", "<span>&#92;</span>").replace("$", DOLLAR)


def metadata(reply: Reply) -> dict[str, Any]:
    """What the output's metadata says of the call, so that a saved notebook can be audited without the ledger."""
    usage = reply.usage
    counts = None
    if usage is not None:
        names = ("input_tokens", "output_tokens", "cached_input_tokens", "reasoning_tokens", "estimated")
        counts = {name: getattr(usage, name) for name in names}
    cost = reply.cost_usd
    return {
        "llmkit": {
            "request_id": reply.request_id,
            "model": tidy(reply.model, limit=200),
            "usage": counts,
            "cost_usd": None if cost is None else f"{cost:f}",
            "source": reply.source,
        }
    }


def of_reply(reply: Reply, *, interrupted: bool = False, timings: bool = True) -> list[Part]:
    """The line of a reply, whole or not; without ``timings`` it is the same each time the same thing happens."""
    return list(_of_reply(reply, interrupted, timings))


def _of_reply(reply: Reply, interrupted: bool, timings: bool) -> Iterator[Part]:
    if reply.source != "degraded":
        yield Part(tidy(reply.model, limit=100))
    if reply.usage is not None:
        yield Part(_tokens(reply.usage))
    yield _cost(reply.attempts, reply.cost_usd)
    if timings and reply.latency_s is not None:
        at_once = reply.source == "cache" or reply.time_to_first_token_s is None
        first = "" if at_once else f" (first token {seconds(reply.time_to_first_token_s or 0)})"
        yield Part(f"{seconds(reply.latency_s)}{first}")
    yield _source(reply)
    yield from _detours(reply)
    if (ending := _ending(reply, interrupted)) is not None:
        yield ending
    earlier = reply.attempts if reply.source == "degraded" else reply.attempts[:-1]
    yield from _maybe_billed([attempt for attempt in earlier if attempt.maybe_billed])


def of_attempts(attempts: Sequence[Attempt], elapsed_s: float, *, timings: bool = True) -> list[Part]:
    """The line of a call that never came to an answer; empty where nothing was sent."""
    if not attempts:
        return []
    last = attempts[-1]
    parts = [Part(tidy(f"{last.provider}:{last.model}", limit=100)), Part(_count(len(attempts), "attempt"))]
    if timings:
        parts.append(Part(seconds(elapsed_s)))
    return [*parts, *_maybe_billed([a for a in attempts if a.maybe_billed])]


def _tokens(usage: Usage) -> str:
    about = "≈" if usage.estimated else ""
    detail = []
    if usage.cached_input_tokens:
        detail.append(f"{usage.cached_input_tokens:,} cached")
    if usage.reasoning_tokens:
        detail.append(f"{usage.reasoning_tokens:,} reasoning")
    inside = f" ({', '.join(detail)})" if detail else ""
    return f"{about}{usage.input_tokens:,} → {about}{usage.output_tokens:,} tokens{inside}"


def _cost(attempts: Sequence[Attempt], cost: Decimal | None) -> Part:
    if cost is None:
        unpriced = next((f"{a.provider}:{a.model}" for a in attempts if a.cost_usd is None), "the model")
        return Part(f"cost unknown: no price for {tidy(unpriced, limit=100)}", warns=True)
    about = "≈" if cost and any(a.usage is not None and a.usage.estimated for a in attempts) else ""
    return Part(f"{about}{money(cost)}")


def notes(sentences: Iterable[str]) -> list[Part]:
    """Sentences that are lines of their own below the line; each once."""
    return [Part(each, warns=True, below=True) for each in dict.fromkeys(tidy(each, limit=300) for each in sentences)]


def _source(reply: Reply) -> Part:
    if reply.source == "simulated":
        return Part("simulated")
    if reply.source in {"cache", "coalesced"}:
        saved = reply.call.trail.saved
        return Part(f"{reply.source}, saved {money(saved)}" if saved else reply.source)
    if reply.source == "degraded":
        return Part("degraded: the text set for when no model answers", warns=True)
    return Part(tidy(reply.provider or reply.source, limit=60))


def _detours(reply: Reply) -> Iterator[Part]:
    """Retries, and the links that were left."""
    tried = {f"{a.provider}:{a.model}" for a in reply.attempts[:-1]}
    left = sum(skipped.endpoint in tried for skipped in reply.skipped if _is_error(skipped.reason))
    repairs = reply.call.trail.repairs
    retries = len(reply.attempts) - max(1, left + (reply.source != "degraded")) - repairs
    if retries > 0:
        statuses = {str(a.http_status or a.error) for a in reply.attempts[:-1] if a.status == "failed"}
        why = f" ({', '.join(sorted(statuses))})" if statuses else ""
        yield Part(tidy(_count(retries, "retry", "retries") + why, limit=100))
    if repairs:
        yield Part("asked again to fit its schema")
    for skipped in reply.skipped:
        if _is_error(skipped.reason):
            yield Part(f"fell back from {tidy(skipped.endpoint, limit=100)} ({skipped.reason.partition(':')[0]})")


def _is_error(reason: str) -> bool:
    """Whether a link was left for an error, which its reason then begins with the name of."""
    name, colon, _ = reason.partition(":")
    return bool(colon) and name.isidentifier()


def _ending(reply: Reply, interrupted: bool) -> Part | None:
    if interrupted:
        return Part("interrupted", warns=True)
    if reply.cut == "max_cost":
        cap = reply.call.max_cost_usd
        return Part("cut at the cap" if cap is None else f"cut at the cap of {money(cap)}", warns=True)
    if reply.cut is not None:
        return Part("cut at the limit of tokens", warns=True)
    if reply.outcome is not None and reply.outcome.status == "failed":
        return Part("broken off", warns=True)
    if reply.finish_reason in {"length", "max_tokens"}:
        return Part("ended at the limit of output tokens", warns=True)
    return None


def _maybe_billed(attempts: Sequence[Attempt]) -> Iterator[Part]:
    if attempts:
        yield Part(f"{_count(len(attempts), 'attempt')} without an end may be billed", warns=True)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def seconds(time_s: float) -> str:
    """A time as people say it."""
    if time_s < 0.001:
        return "under 1 ms"
    if time_s < 1:
        return f"{time_s * 1000:.0f} ms"
    return f"{time_s:.1f} s" if time_s < 60 else f"{int(time_s // 60)} min {int(time_s % 60)} s"
