"""Prompts under their names, in a notebook: what ``--save`` and ``--with`` do, and ``%llm prompts``."""

from __future__ import annotations

import difflib
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.comparison import joined
from llmkit.errors import ConfigError, TemplateError
from llmkit.notebook.formats import plain
from llmkit.notebook.template import render, render_parts
from llmkit.prompts import TAG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llmkit.notebook.arguments import CellLine
    from llmkit.notebook.magics import LLMMagics
    from llmkit.notebook.question import Question
    from llmkit.prompts import KeptPrompt, Prompts

__all__ = ["Filled", "fill", "keep", "run", "tagged"]

USAGE = "%llm prompts, %llm prompts NAME, %llm prompts NAME@1 NAME@3, or %llm prompts NAME[@VERSION] remove"
SHOWN_WORDS = 60
MOST_LINES = 400
"""Of a difference; more is a line that says so."""


class Filled(NamedTuple):
    """A prompt with its variables filled in.

    Attributes:
        system: None where there is none. template: what the text was made from.
        parts: what each ``{{ … }}`` of it has put in: the expression, and its text.
    """

    text: str
    system: str | None
    template: str
    parts: tuple[tuple[str, str], ...] = ()


def fill(
    cell: str, system: str | None, kept: KeptPrompt | None, *, raw: bool, names: tuple[Mapping[str, Any], ...]
) -> Filled:
    """Fill in a kept prompt, and what follows it.

    Args:
        cell: what follows; alone, where nothing is kept.
        system: the cell's own system prompt, in the place of the kept one.
        raw: the cell is no template.

    Raises:
        TemplateError: a part cannot be filled in.
    """
    template = cell.strip("\n").rstrip()
    text, parts = (template, []) if raw else render_parts(template, *names)
    if system is not None and not raw:
        system = render(system, *names)
    if kept is None:
        return Filled(text, system, template, tuple(parts))
    try:
        before, earlier = (kept.text, []) if kept.raw else render_parts(kept.text, *names)
        if system is None and kept.system is not None:
            system = kept.system if kept.raw else render(kept.system, *names)
    except TemplateError as error:
        message, step = f"in the kept prompt {kept.reference}: {error.message}", error.next_step
        raise TemplateError(message, name=error.name, next_step=step) from None
    return Filled(joined(before, text), system, joined(kept.text, template), (*earlier, *parts))


def keep(prompts: Prompts, said: CellLine, question: Question) -> None:
    """Keep what ``--save`` names, as it stood before it was filled in, and tag the call with it.

    Raises:
        ConfigError: it cannot be kept; nothing has been sent yet.
        StoreError: the file cannot be written.
    """
    if said.save is None:
        return
    kept, template = question.kept, question.template
    system = said.options.get("system") or (kept.system if kept else None)
    if kept is not None and kept.raw != said.raw and any(mark in template for mark in ("{{", "{%")):
        step = "say --raw for both, or for none"
        raise ConfigError(
            f"{kept.reference} is {'no ' if kept.raw else 'a '}template, and the cell is not", next_step=step
        )
    tagged(said.options.get("tags"), said.save)  # refused before it is kept
    made = prompts.save(said.save, template, system, raw=said.raw)
    question.options["tags"] = tagged(said.options.get("tags"), made.reference)
    if not said.quiet:
        print(f"llmkit: kept as {made.reference}")


def tagged(tags: Mapping[str, str] | None, reference: str) -> dict[str, str]:
    """``tags``, and which version of which prompt it was.

    Raises:
        ConfigError: that tag is used for something else.
    """
    if TAG in (tags or {}):
        raise ConfigError(
            f"the tag {TAG} says which kept prompt was asked", next_step="choose another key for your own"
        )
    return {**(tags or {}), TAG: reference}


# -- %llm prompts ------------------------------------------------------------------------------------------------------


def run(magics: LLMMagics, words: list[str]) -> None:
    """``%llm prompts …``."""
    prompts = magics.session.prompts
    if not words:
        print(_list(prompts))
    elif len(words) == 2 and words[1] == "remove":
        _remove(prompts, words[0])
    elif len(words) == 1 and "@" not in words[0]:
        print(_name(prompts, words[0]))
    elif len(words) == 1:
        print(plain(_shown(prompts.get(words[0]))))
    elif len(words) == 2:
        print(_difference(*(prompts.get(word) for word in words)))
    else:
        raise ConfigError(f"{words[2]!r:.60} has no place here", next_step=f"write {USAGE}")


def _list(prompts: Prompts) -> str:
    newest = {prompt.name: prompt for prompt in prompts}
    if not newest:
        return f"no prompt is kept in {prompts.project} yet: %%llm --save NAME keeps one"
    rows = [("name", "versions", "saved", "begins with")]
    counts: dict[str, int] = {}
    for prompt in prompts:
        counts[prompt.name] = counts.get(prompt.name, 0) + 1
    rows += [(p.reference, str(counts[p.name]), _when(p.saved), _first_words(p.text)) for p in newest.values()]
    return _table(rows) + f"\n\nproject {prompts.project}"


def _name(prompts: Prompts, name: str) -> str:
    versions = prompts.versions(name)
    rows = [
        ("version", "saved", "begins with"),
        *((p.reference, _when(p.saved), _first_words(p.text)) for p in versions),
    ]
    parts = [_table(rows)]
    parts.append(plain(_shown(versions[0])) if len(versions) == 1 else _difference(*versions[-2:]))
    return "\n\n".join(parts)


def _remove(prompts: Prompts, reference: str) -> None:
    number = prompts.remove(reference)
    print(f"llmkit: {reference} is removed" + (f", {number} versions" if number > 1 else ""))


def _shown(prompt: KeptPrompt) -> str:
    system = f"system: {prompt.system}\n\n" if prompt.system else ""
    return f"{prompt.reference}{' (raw)' if prompt.raw else ''}\n\n{system}{prompt.text}"


def _difference(before: KeptPrompt, after: KeptPrompt) -> str:
    lines = list(_diff_lines(before, after))
    if not lines:
        return f"{before.reference} and {after.reference} say the same"
    more = len(lines) - MOST_LINES
    return plain("\n".join([*lines[:MOST_LINES], *([f"… and {more:,} lines more"] if more > 0 else [])]))


def _diff_lines(before: KeptPrompt, after: KeptPrompt) -> Iterator[str]:
    names = before.reference, after.reference
    if (before.system or "") != (after.system or ""):
        yield from (f"- system: {before.system}" for _ in range(bool(before.system)))
        yield from (f"+ system: {after.system}" for _ in range(bool(after.system)))
    if before.raw != after.raw:
        yield f"{names[1 if after.raw else 0]} is raw: no template"
    yield from difflib.unified_diff(before.text.split("\n"), after.text.split("\n"), *names, lineterm="")


def _first_words(text: str) -> str:
    words = plain(" ".join(text[: 8 * SHOWN_WORDS].split()))
    return words if len(words) <= SHOWN_WORDS else words[: SHOWN_WORDS - 1] + "…"


def _when(saved: float) -> str:
    return f"{datetime.fromtimestamp(saved).astimezone():%Y-%m-%d %H:%M}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
