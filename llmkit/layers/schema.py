"""See to it that an answer has the shape that was asked for: checked when it is whole, and asked for once more if not.

Above the cache, so that a stored answer is checked like any other, and both the first answer and the repaired one come
from there the next time. Below the record, so that all of it is one call: one id, one deadline, one trail, and so one
cap on all of its cost.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llmkit.call import Message
from llmkit.errors import LLMKitError, SchemaMismatch
from llmkit.events import Checking, Repairing, emit
from llmkit.models import tokens
from llmkit.schema import LONGEST_PROBLEM, MOST_PROBLEMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.call import Call
    from llmkit.pipeline import CallNext
    from llmkit.reply import Reply
    from llmkit.schema import Schema

__all__ = ["SchemaCheck", "most_added"]

LONGEST_REPEATED = 100_000
"""Characters of an answer up to which it is sent back to be repaired. A longer one is asked for by its problems alone."""

WIDEST = "\U0010ffff"  # of all characters, in UTF-8
QUICK = 50_000  # characters; reading more is done on a thread
_FREE = frozenset({"cache", "coalesced"})
_CUT = frozenset({"length", "max_tokens"})


class SchemaCheck:
    """Hands on replies that fit ``call.schema``; a call without one passes untouched."""

    async def __call__(self, call: Call, call_next: CallNext) -> Reply:
        schema = call.schema
        if schema is None:
            return await call_next(call)
        reply = await _whole(call, call_next)
        problems = await _problems(schema, reply)
        if not problems:
            return reply
        no_use = _no_use(reply)
        if no_use is not None:
            raise _mismatch(reply, problems, *no_use, repaired=False)
        emit(call, Repairing(call.request_id, tuple(problems)))
        call.trail.repairs += 1
        last = await _repaired(call, call_next, reply, problems)
        if left := await _problems(schema, last):
            raise _mismatch(last, left, "nor did the first one", None, repaired=True)
        return last


async def _whole(call: Call, call_next: CallNext) -> Reply:
    """A reply that has ended. One that broke says so itself, to whoever reads it."""
    reply = await call_next(call)
    if reply.outcome is None:
        emit(call, Checking(call.request_id, reply))
    try:
        await reply.read()
    except LLMKitError as error:
        if reply.outcome is None or reply.outcome.error is not error:
            raise
    return reply


async def _problems(schema: Schema, reply: Reply) -> Sequence[str]:
    """What is wrong with the answer; nothing if it fits, and nothing of one that broke."""
    if reply.outcome is not None and reply.outcome.status == "failed":
        return ()
    text = reply.text
    try:
        fit = schema.fit(text) if len(text) <= QUICK else await asyncio.to_thread(schema.fit, text)
    except ValueError as error:
        return getattr(error, "problems", (str(error),))
    reply.fitted(fit.data, fit.text)
    return ()


def _no_use(reply: Reply) -> tuple[str, str | None] | None:
    """Why asking again would not help, if so, and what would."""
    if reply.cut is not None or reply.finish_reason in _CUT:
        reached = reply.cut if reply.cut is not None else "the limit of output tokens"
        return (
            f"it was cut because it reached {reached}, and so would be the next one",
            "raise --max-tokens or --max-cost, or ask for less",
        )
    if reply.outcome is not None and reply.outcome.status != "complete":
        return "it was broken off", None
    if reply.source == "degraded":
        return (
            "no model could answer, and the text of [degraded] has another shape",
            "try again later, or add a fallback",
        )
    return None if reply.text.strip() else ("it has no text", None)


async def _repaired(call: Call, call_next: CallNext, reply: Reply, problems: Sequence[str]) -> Reply:
    """The answer to the same question, told what was wrong with the first.

    Raises:
        LLMKitError: it could not be asked; ``error.reply`` is then the first answer.
    """
    trail = call.trail
    saved, trail.saved = trail.saved, None
    try:
        last = await _whole(call.to(messages=(*call.messages, *_correction(call, reply.text, problems))), call_next)
    except LLMKitError as error:
        if error.reply is None or not error.reply.text:
            error.reply = reply
        said = f"the first answer, which is kept, does not fit its schema ({problems[0]}), and could not be repaired"
        error.next_step = f"{said}; {error.next_step}" if error.next_step else said
        raise
    finally:
        if saved is not None:
            trail.saved = saved if trail.saved is None else saved + trail.saved
    return last


def _correction(call: Call, text: str, problems: Sequence[str]) -> tuple[Message, ...]:
    assert call.schema is not None
    asked = _asked_again(call.schema, problems)
    return (asked,) if len(text) > LONGEST_REPEATED else (Message("assistant", text), asked)


def _asked_again(schema: Schema, problems: Sequence[str]) -> Message:
    listed = "\n".join(f"- {problem}" for problem in problems)
    # With the schema once more: a server may have ignored it where it was told by a field of the request.
    return Message("user", f"That answer does not fit:\n{listed}\n\nAnswer again, mended. {schema.instruction}")


def most_added(schema: Schema) -> int:
    """Input tokens that no correction exceeds, beside those of the question and of the answer that it repeats."""
    problems = [WIDEST * LONGEST_PROBLEM] * MOST_PROBLEMS
    return tokens.upper_bound((Message("assistant", ""), _asked_again(schema, problems)))


def _mismatch(
    reply: Reply, problems: Sequence[str], why: str, next_step: str | None, *, repaired: bool
) -> SchemaMismatch:
    if next_step is None and reply.source in _FREE:
        next_step = f"that answer was stored: --cache refresh asks anew; or {SchemaMismatch.default_next_step}"
    error = SchemaMismatch(
        f"the answer of {reply.model} does not fit its schema; {why}",
        problems=problems,
        repaired=repaired,
        provider=reply.provider,
        model=reply.model,
        provider_request_id=reply.head.provider_request_id,
        next_step=next_step,
    )
    error.reply = reply
    return error
