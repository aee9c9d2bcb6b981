"""What tells one request from another: the key under which its answer is kept.

The key is a SHA-256 over the whole request as it goes over the wire, less the few fields that cannot change the answer
(`SILENT`). The fields of the body are sorted; what is inside them is taken in its own order, since that may reach the
model: the properties of a JSON schema are answered in the order in which they stand. A field that is not known here
always counts: an answer is rather paid for twice than given to the wrong question.

Who asks is not part of it: no key, no header that names one.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from llmkit.errors import LLMKitError
from llmkit.providers.http import WIRES
from llmkit.providers.wire import encoded

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.endpoint import Endpoint
    from llmkit.providers.wire import Wire

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


class RequestKeys:
    """Makes the keys of requests; remembers what those to one endpoint have in common."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Endpoint, Wire, frozenset[str], bytes]] = {}

    def __call__(self, call: Call, endpoint: Endpoint) -> str | None:
        """The key of ``call`` at ``endpoint``, in hexadecimal; None where it cannot be said there, or not in JSON."""
        known = self._known.get(id(endpoint))
        if known is None or known[0] is not endpoint:
            known = self._of(endpoint)
            if known is None:
                return None
        _, wire, silent, shared = known
        try:
            body = wire.body(call, endpoint)
            said = encoded([(name, body[name]) for name in sorted(body) if name not in silent])
        except (ValueError, TypeError, RecursionError, LLMKitError):
            return None
        # The seed counts even where the format cannot say it: who gives two wants two answers.
        which = f"{call.repeat} {call.params.seed} {call.namespace}\n".encode("utf-8", "surrogatepass")
        return sha256(b"%b%d %b%b" % (shared, len(which), which, said)).hexdigest()

    def _of(self, endpoint: Endpoint) -> tuple[Endpoint, Wire, frozenset[str], bytes] | None:
        wire = WIRES.get(endpoint.wire)
        if wire is None:
            return None
        headers = sorted((n.lower(), value) for n, value in endpoint.headers if n.lower() not in _WHO_ASKS)
        where = [SCHEMA, endpoint.wire, endpoint.base_url.rstrip("/"), endpoint.simulated, headers]
        known = (endpoint, wire, SILENT.get(endpoint.wire, frozenset()), encoded(where) + b"\n")
        if len(self._known) >= _MOST_ENDPOINTS:
            self._known.clear()
        self._known[id(endpoint)] = known
        return known
