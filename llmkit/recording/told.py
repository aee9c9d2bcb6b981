"""What a call was told: an answer or an error, as plain JSON and back, so that what is replayed is what was seen.

Whoever can write the file can write anything, so each field is checked before it becomes a reply or an error.
What is never the same twice, ids and times, stands apart (``run``), so that the rest of a line can be compared.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from llmkit.call import Attempt, Skipped
from llmkit.events import AlertRaised, BudgetWarning
from llmkit.recording.failed import Malformed, error_of, number, of_error, text_of, usage_of, written_usage
from llmkit.reply import Chunk, Head, Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from llmkit.call import Call
    from llmkit.clock import Clock
    from llmkit.errors import LLMKitError
    from llmkit.events import Event
    from llmkit.recording.scrubbing import Scrub
    from llmkit.reply import Outcome

__all__ = ["Malformed", "Told", "is_kept", "written"]

_RUN = ("started", "latency_s", "time_to_first_token_s", "provider_request_id")
_OF_ATTEMPT = tuple(f.name for f in fields(Attempt) if f.name not in {*_RUN, "usage", "cost_usd"})
_ATTEMPT_TEXTS = frozenset({"provider", "model", "status", "error", "message", "finish_reason", "provider_request_id"})
_MOST = 1000  # attempts, links left, warnings and notes of one call
_MOST_CHUNKS = 1_000_000


def is_kept(outcome: Outcome) -> bool:
    """Whether it ended by itself. What was interrupted, or left by its reader, would be another answer the next time."""
    from llmkit.errors import LLMKitError

    if outcome.status == "failed":
        return isinstance(outcome.error, LLMKitError)
    return outcome.reply is not None and (outcome.status == "complete" or outcome.reply.cut is not None)


def written(call: Call, outcome: Outcome, notes: Sequence[Event], scrub: Scrub) -> dict[str, Any]:
    """How ``call`` ended, as plain JSON: ``answer`` or ``error`` or both, ``way``, ``run``."""
    reply, trail = outcome.reply, call.trail
    told: dict[str, Any] = {}
    beside = reply is None and outcome.error is not None  # then what was kept of an answer is the error's
    if beside:
        reply = getattr(outcome.error, "reply", None)
    if reply is not None:
        told["answer"] = _answer(reply, scrub) | ({"beside": True} if beside else {})
    if outcome.error is not None:
        told["error"] = scrub.tree(of_error(outcome.error))
    way = {
        "attempts": [_attempt(each) for each in trail.attempts],
        "skipped": [[each.endpoint, each.reason] for each in trail.skipped],
        "saved_usd": _amount(trail.saved),
        "repairs": trail.repairs or None,
        "warnings": trail.warnings,
        "notes": [each for each in map(_note, notes) if each is not None],
        "max_cost_usd": _amount(call.max_cost_usd) if reply is not None and reply.cut is not None else None,
    }
    told["way"] = scrub.tree(_given(way))
    run = {
        "request_id": call.request_id,
        "started": call.started_at,
        "latency_s": None if reply is None else reply.latency_s,
        "failed_s": getattr(outcome.error, "latency_s", None),
        "time_to_first_token_s": None if reply is None else reply.time_to_first_token_s,
        "waited_s": trail.waited_s or None,
        "provider_request_id": None if reply is None else reply.head.provider_request_id,
        "attempts": [[getattr(each, name) for name in _RUN] for each in trail.attempts],
    }
    told["run"] = scrub.tree(_given(run), prose=False)
    return told


def _given(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None and value != []}


def _answer(reply: Reply, scrub: Scrub) -> dict[str, Any]:
    chunks, head = reply.chunks, reply.head
    texts = scrub.pieces([chunk.text for chunk in chunks])
    thoughts = scrub.pieces([chunk.reasoning for chunk in chunks])
    sizes = [(len(text), len(thought)) for text, thought in zip(texts, thoughts, strict=True) if text or thought]
    answer = {
        "text": "".join(texts),
        "reasoning": "".join(thoughts) or None,
        "chunks": [size if not thought else [size, thought] for size, thought in sizes],
        "model": scrub.tree(reply.model, prose=False),
        "provider": reply.provider,
        "source": reply.source,
        "finish_reason": head.finish_reason,
        "cut": reply.cut,
        "refusal": scrub.tree(head.refusal),
        "service_tier": head.service_tier,
        "tool_calls": scrub.tree(head.tool_calls),
        "usage": written_usage(reply.usage),
    }
    return {"text": "", "chunks": [], **_given(answer)}


def _attempt(attempt: Attempt) -> dict[str, Any]:
    told = {name: getattr(attempt, name) for name in _OF_ATTEMPT}
    told |= {"usage": written_usage(attempt.usage), "cost_usd": _amount(attempt.cost_usd)}
    return {name: value for name, value in told.items() if value is not None and value is not False}


def _amount(amount: Decimal | None) -> str | None:
    return None if amount is None else f"{amount:f}"


def _note(event: Event) -> dict[str, Any] | None:
    """What the cell says below the answer. Everything else that happened is in the attempts."""
    if isinstance(event, BudgetWarning):
        return {"scope": event.scope, "message": event.message}
    if isinstance(event, AlertRaised):
        amounts = {"spent": f"{event.spent:f}", "threshold": f"{event.threshold:f}"}
        return {"kind": event.kind, "message": event.message, **amounts}
    return None


class Told:
    """What a recorded call was told, checked.

    Raises:
        Malformed: a field is missing or of the wrong kind.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        try:
            self._read(told)
        except Malformed:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
            raise Malformed(f"a field is missing or of the wrong kind ({type(error).__name__})") from None

    def _read(self, told: dict[str, Any]) -> None:
        answer, way, run = told.get("answer"), told.get("way", {}), told["run"]
        self.request_id = text_of(run["request_id"])
        self.latency_s, self.failed_s = number(run.get("latency_s")), number(run.get("failed_s"))
        self.first_token_s = number(run.get("time_to_first_token_s"))
        self.started_at = number(run.get("started")) or 0.0
        self.waited_s = number(run.get("waited_s")) or 0.0
        runs = run.get("attempts", [])
        self.attempts = [
            _read_attempt(each, of_run) for each, of_run in zip(_list(way.get("attempts", [])), runs, strict=True)
        ]
        self.skipped = [Skipped(text_of(end), text_of(why)) for end, why in _list(way.get("skipped", []))]
        self.saved = _read_amount(way.get("saved_usd"))
        self.repairs = way.get("repairs", 0)
        if type(self.repairs) is not int:
            raise Malformed("the number of repairs is none")
        self.warnings = [text_of(each) for each in _list(way.get("warnings", []))]
        self.notes = [_read_note(self.request_id, each) for each in _list(way.get("notes", []))]
        self.max_cost = _read_amount(way.get("max_cost_usd"))
        self._failure = told.get("error")
        self.answer = None if answer is None else _Answer(answer, _maybe(run.get("provider_request_id")))
        if self._failure is not None:
            error_of(self._failure, self.request_id)
        elif self.answer is None:
            raise Malformed("there is neither an answer nor an error")

    def error(self) -> LLMKitError | None:
        """A new error of the kind that it was; None where there was none."""
        if self._failure is None:
            return None
        error = error_of(self._failure, self.request_id)
        error.latency_s = self.failed_s
        return error

    def call(self, call: Call) -> Call:
        """``call`` as if it had been that one."""
        trail = call.trail
        trail.attempts[:], trail.skipped[:] = self.attempts, self.skipped
        trail.warnings[:], trail.saved, trail.waited_s = self.warnings, self.saved, self.waited_s
        trail.attempts_begun, trail.repairs = len(self.attempts), self.repairs
        changes: dict[str, Any] = {"request_id": self.request_id, "started_at": self.started_at}
        if self.max_cost is not None:
            changes["max_cost_usd"] = self.max_cost
        return call.to(**changes)

    def reply(self, call: Call, clock: Clock) -> Reply:
        """The answer, to be read chunk by chunk as it was; ``call`` is that of `call`."""
        answer = self.answer
        assert answer is not None
        head = Head()
        head.model = answer.model
        reply = Reply(
            call,
            self._rest(head, answer),
            head=head,
            clock=clock,
            first=answer.chunks()[:1],
            provider=answer.provider,
            where=answer.source,
        )
        reply.time_to_first_token_s = self.first_token_s
        reply.cut = answer.cut
        return reply

    async def _rest(self, head: Head, answer: _Answer) -> AsyncIterator[list[Chunk]]:
        for chunk in answer.chunks()[1:]:
            yield [chunk]
        answer.fill(head)
        error = None if answer.beside else self.error()
        if error is not None:
            raise error

    async def ended(self, outcome: Outcome) -> None:
        """What is known at the end of a reply only; a hook for it."""
        reply = outcome.reply
        if reply is None or self.answer is None:
            return
        reply.latency_s, reply.usage = self.latency_s, self.answer.usage
        schema = reply.call.schema
        if schema is not None and outcome.status == "complete":
            with suppress(ValueError):  # as it was: what does not fit has no data
                fit = schema.fit(reply.text)
                reply.fitted(fit.data, fit.text)


class _Answer:
    """The checked fields of an answer."""

    def __init__(self, told: dict[str, Any], provider_request_id: str | None) -> None:
        self.text, self.reasoning = text_of(told["text"]), text_of(told.get("reasoning", ""))
        self.sizes = [(each, 0) if type(each) is int else tuple(each) for each in _list(told["chunks"], _MOST_CHUNKS)]
        if any(type(size) is not int or size < 0 for pair in self.sizes for size in pair):
            raise Malformed("the sizes of its chunks are no numbers")
        if (sum(a for a, _ in self.sizes), sum(b for _, b in self.sizes)) != (len(self.text), len(self.reasoning)):
            raise Malformed("its chunks do not add up to its text")
        self.model, self.provider = text_of(told.get("model", "")), text_of(told.get("provider", ""))
        self.source = text_of(told["source"])
        self.cut = _maybe(told.get("cut"))
        self.beside = told.get("beside") is True
        self.usage = usage_of(told.get("usage"))
        self._head = {name: _maybe(told.get(name)) for name in ("finish_reason", "refusal", "service_tier")}
        self._head["provider_request_id"] = provider_request_id
        self._tool_calls = _list(told.get("tool_calls", []))
        if not all(isinstance(each, dict) for each in self._tool_calls):
            raise Malformed("a tool call is no table")

    def chunks(self) -> list[Chunk]:
        made, at, beside = [], 0, 0
        for size, thought in self.sizes:
            made.append(Chunk(self.text[at : at + size], self.reasoning[beside : beside + thought]))
            at, beside = at + size, beside + thought
        return made

    def fill(self, head: Head) -> None:
        for name, value in self._head.items():
            setattr(head, name, value)
        head.tool_calls = self._tool_calls
        head.usage = self.usage


def _list(value: Any, most: int = _MOST) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise Malformed("a list is missing or too long")
    return value


def _maybe(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _read_amount(value: Any) -> Decimal | None:
    if value is None:
        return None
    try:
        amount = Decimal(text_of(value))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or not 0 <= amount < 10**9:
        raise Malformed("an amount is no amount")
    return amount


def _read_attempt(told: dict[str, Any], run: list[Any]) -> Attempt:
    started, latency_s, first_token_s, provider_request_id = run
    known = {name: told[name] for name in _OF_ATTEMPT if name in told}
    for name, value in known.items():
        if name in _ATTEMPT_TEXTS:
            text_of(value)
        elif type(value) is not (bool if name == "maybe_billed" else int):
            raise Malformed(f"{name} of an attempt is of the wrong kind")
    return Attempt(
        started=number(started) or 0.0,
        latency_s=number(latency_s) or 0.0,
        time_to_first_token_s=number(first_token_s),
        provider_request_id=_maybe(provider_request_id),
        usage=usage_of(told.get("usage")),
        cost_usd=_read_amount(told.get("cost_usd")),
        **known,
    )


def _read_note(request_id: str, told: dict[str, Any]) -> Event:
    message = text_of(told["message"])
    if "scope" in told:
        return BudgetWarning(request_id, text_of(told["scope"]), message)
    spent, threshold = _read_amount(told["spent"]), _read_amount(told["threshold"])
    assert spent is not None and threshold is not None  # noqa: PT018  what is not there is no text, and refused above
    return AlertRaised(request_id, text_of(told["kind"]), message, spent, threshold)
