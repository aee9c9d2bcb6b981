"""From a request to the answer it gets: its text, its limits, and the faults that are part of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.testing.answers import pieces, prose, thoughts
from llmkit.testing.instances import instance
from llmkit.testing.wires import Generation

if TYPE_CHECKING:
    from llmkit.testing.books import Settings
    from llmkit.testing.faults import Fault
    from llmkit.testing.wires import Ask

__all__ = ["generated"]

_REASONING = 64  # tokens thought in vain where the request sets no limit
_REFUSAL = "I'm sorry, but I can't help with that."


def generated(ask: Ask, body: dict[str, Any], settings: Settings, fault: Fault) -> Generation:
    """The answer to ``ask``. ``body`` is the same request as it came.

    Raises:
        TypeError: the user's own answer function gave something else than text.
    """
    generation = Generation(
        ask=ask,
        answer=[],
        reasoning=thoughts(settings.reasoning_tokens),
        show_reasoning=settings.show_reasoning,
        cached_tokens=min(settings.cached_tokens, ask.input_tokens),
        usage=fault.variants[0] if fault.kind == "usage" else settings.usage,
    )
    if fault.kind == "refusal":
        generation.reasoning, generation.answer = [], pieces(_REFUSAL)
        generation.finish, generation.refused = "refusal", True
    elif fault.kind == "reasoning_only":
        generation.reasoning, generation.finish = thoughts(ask.max_tokens or _REASONING), "length"
    else:
        _answer(generation, _text(ask, body, settings))
    if fault.kind == "content_filter":
        generation.answer = generation.answer[: fault.after]
        generation.finish, generation.stopped_by = "content_filter", None
    return generation


def _answer(generation: Generation, text: str) -> None:
    """Answer with ``text``, as far as stop sequences and the limit allow."""
    limit = generation.ask.max_tokens
    text, generation.stopped_by = _until(text, generation.ask.stop)
    generation.answer = pieces(text)
    if generation.stopped_by is not None:
        generation.finish = "stop_sequence"
    if limit is not None and generation.output_tokens > limit:
        generation.reasoning = generation.reasoning[:limit]
        generation.answer = generation.answer[: limit - len(generation.reasoning)]
        generation.finish, generation.stopped_by = "length", None


def _text(ask: Ask, body: dict[str, Any], settings: Settings) -> str:
    answer = settings.answer
    if callable(answer):
        answer = answer(body)
        if not isinstance(answer, str):
            raise TypeError(f"the simulator's answer function gave {type(answer).__name__}, not text")
    if answer is not None:
        return answer
    if ask.schema is not False:
        return instance(ask.schema)
    return prose(ask.prompt, f"{settings.seed} {ask.fingerprint}", ask.pictures)


def _until(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the first stop sequence, and which one that was."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop
