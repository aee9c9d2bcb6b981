"""What tells one request from another: the key under which its answer is kept.

The key is a SHA-256 over the whole request as it goes over the wire, less the few fields that cannot change the answer
(`SILENT`). The fields of the body are sorted; what is inside them is taken in its own order, since that may reach the
model: the properties of a JSON schema are answered in the order in which they stand. A field that is not known here
always counts: an answer is rather paid for twice than given to the wrong question.

Who asks is not part of it: no key, no header that names one.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from llmkit.call import Call
from llmkit.errors import LLMKitError
from llmkit.providers.http import WIRES
from llmkit.providers.wire import encoded

if TYPE_CHECKING:
    from llmkit.endpoint import Endpoint

__all__ = ["SCHEMA", "SILENT", "RequestKeys"]

SCHEMA = 1
"""Raised when the same request gets another key, or a stored answer another meaning: what was stored is left behind."""

SILENT: dict[str, frozenset[str]] = {
    "openai": frozenset(
        {
            "stream",  # how the answer is delivered, not what it says
            "stream_options",  # the same
            "user",  # who is responsible for it, for the provider's watch over abuse
            "safety_identifier",  # the newer name of that
            "metadata",  # labels beside the stored completion
            "store",  # whether the provider keeps it
            "service_tier",  # how fast and how dear; the same model
            "prompt_cache_key",  # which machine is likely to have the prompt at hand
            "prompt_cache_retention",  # for how long
        }
    ),
    "anthropic": frozenset(
        {
            "stream",
            "metadata",  # ``user_id``, for the provider's watch over abuse
            "service_tier",
        }
    ),
}
"""By wire format, the fields of a request's body that cannot change the answer."""

_WHO_ASKS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"})
_MOST_ENDPOINTS = 256
_MOST_QUESTIONS = 512
_LONGEST_QUESTION = 20_000  # characters; of longer ones the key is made each time
_PLAIN = Call.params  # what a call has where nothing was said


class RequestKeys:
    """Makes the keys of requests. Remembers what those to one endpoint have in common, and the keys of the last ones."""

    def __init__(self) -> None:
        self._known: dict[int, _Endpoint] = {}

    def __call__(self, call: Call, endpoint: Endpoint) -> str | None:
        """The key of ``call`` at ``endpoint``, in hexadecimal; None where it cannot be said there, or not in JSON."""
        known = self._known.get(id(endpoint))
        if known is None or known.endpoint is not endpoint:
            if endpoint.wire not in WIRES:
                return None
            if len(self._known) >= _MOST_ENDPOINTS:
                self._known.clear()
            known = self._known[id(endpoint)] = _Endpoint(endpoint)
        question = _question(call)
        key = known.keys.get(question)
        if key is None:
            key = known.key(call)
            if question is not None and key is not None:
                if len(known.keys) >= _MOST_QUESTIONS:
                    known.keys.clear()
                known.keys[question] = key
        return key


def _question(call: Call) -> Any:
    """All of the call that its key is made of, as something that compares at once; None where it is not so simple."""
    params = call.params
    if params.extra:
        return None
    said: list[Any] = [call.namespace, call.repeat, None if call.schema is None else call.schema.key]
    length = 0
    for message in call.messages:
        content = message.content
        if type(content) is not str:
            return None
        length += len(content)
        said += (message.role, content)
    if length > _LONGEST_QUESTION:
        return None
    if params is not _PLAIN:
        # With the types: 1 and 1.0 are the same to Python, and not to JSON.
        for value in (params.temperature, params.top_p, params.max_tokens, params.seed):
            said += (value, type(value))
        said.append(params.stop)
    return tuple(said)


class _Endpoint:
    """What all keys at one endpoint have in common, and the last ones by what was asked."""

    __slots__ = ("_shared", "_silent", "_wire", "endpoint", "keys")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.keys: dict[Any, str] = {}
        self._wire = WIRES[endpoint.wire]
        self._silent = SILENT.get(endpoint.wire, frozenset())
        headers = sorted((n.lower(), value) for n, value in endpoint.headers if n.lower() not in _WHO_ASKS)
        where = [SCHEMA, endpoint.wire, endpoint.base_url.rstrip("/"), endpoint.simulated, headers]
        self._shared = encoded(where) + b"\n"

    def key(self, call: Call) -> str | None:
        try:
            body = self._wire.body(call, self.endpoint)
            said = encoded([(name, body[name]) for name in sorted(body) if name not in self._silent])
        except (ValueError, TypeError, RecursionError, LLMKitError):
            return None
        # The seed counts even where the format cannot say it: who gives two wants two answers.
        which = f"{call.repeat} {call.params.seed} {call.namespace}\n".encode("utf-8", "surrogatepass")
        return sha256(b"%b%d %b%b" % (self._shared, len(which), which, said)).hexdigest()
