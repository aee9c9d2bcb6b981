"""The errors a service answers with, in the words and the shapes of the two providers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.testing.faults import Fault
    from llmkit.testing.wires import Wire

__all__ = ["Refusal", "refusal", "too_long"]

_MESSAGES = {
    400: "The request is not valid.",
    403: "Your account may not do this.",
    404: "There is nothing here.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    429: "Rate limit reached for requests. Please try again later.",
    500: "The server had an error while processing your request.",
    502: "Bad gateway.",
    503: "The service is temporarily unavailable.",
    504: "The upstream did not answer in time.",
    529: "Overloaded.",
}
_WINDOW = 4096  # what is named where the simulator has no window


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error instead of an answer. ``kind`` is a key of `Wire.error`."""

    status: int
    kind: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def document(self, wire: Wire) -> dict[str, Any]:
        return wire.error(self.kind, self.status, self.message)


def refusal(fault: Fault, wire: Wire, *, key: str, window: int | None, now: float) -> Refusal | None:
    """The error that the fault asks for; None where it asks for none.

    Args:
        key: what the client sent as its key.
        now: epoch seconds.
    """
    if fault.kind == "status":
        status = fault.http_status or 500
        message = fault.message or _MESSAGES.get(status, f"The request failed ({status}).")
        return Refusal(status, "status", message, _retry_headers(fault, now))
    if fault.kind == "quota":
        return _QUOTA[wire.name]
    if fault.kind == "auth":
        return Refusal(fault.http_status or 401, "auth", f"Incorrect API key provided: {key}.")
    if fault.kind == "context_too_long":
        window = window or _WINDOW
        return Refusal(400, "context", too_long(wire, window * 2, window))
    if fault.kind == "model_not_found":
        return Refusal(404, "model", "The model does not exist or you do not have access to it.")
    return None


_QUOTA = {
    "openai": Refusal(429, "quota", "You exceeded your current quota, please check your plan and billing details."),
    "anthropic": Refusal(
        400,
        "quota",
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to purchase credits.",
    ),
}


def too_long(wire: Wire, tokens: int, window: int) -> str:
    """How this provider says that the prompt does not fit."""
    if wire.name == "anthropic":
        return f"prompt is too long: {tokens} tokens > {window} maximum"
    return (
        f"This model's maximum context length is {window} tokens. However, your messages resulted in {tokens} tokens. "
        "Please reduce the length of the messages."
    )


def _retry_headers(fault: Fault, now: float) -> dict[str, str]:
    headers: dict[str, str] = {}
    if fault.should_retry is not None:
        headers["x-should-retry"] = "true" if fault.should_retry else "false"
    if fault.retry_after is None:
        return headers
    if fault.retry_form == "ms":
        headers["retry-after-ms"] = f"{fault.retry_after * 1000:g}"
    elif fault.retry_form == "date":
        from email.utils import formatdate

        headers["date"] = formatdate(now, usegmt=True)
        headers["retry-after"] = formatdate(now + fault.retry_after, usegmt=True)
    else:
        headers["retry-after"] = f"{fault.retry_after:g}"
    return headers
