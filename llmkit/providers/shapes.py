"""Which services do not take a schema, as they said so themselves.

A request that is refused because of the schema in it costs nothing, and the same question can be asked with the schema
as an instruction in words. So such a refusal is made one that is worth another attempt, and what it says is remembered
as a quirk of that endpoint for that schema: a service may take one schema and not another.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequest

if TYPE_CHECKING:
    from llmkit.call import Call
    from llmkit.endpoint import Endpoint

__all__ = ["Shapes"]

NO_SCHEMA, NO_JSON = "no_json_schema", "no_json_object"
_MOST = 512
# The field that carries it, by any of its names; what services call it that name no field; and one that could not make
# its model keep to the shape.
_NAMED = re.compile(
    r"response_?(?:format|schema)|json_?schema|json schema|failed to (?:generate|validate) json|output_config|output_format|output format|structured[ _]outputs?"
    r"|guided|grammar|schemas? (?:is|are|contains?) too", re.IGNORECASE)  # fmt: skip
_THE_SCHEMA = re.compile(r"schema|grammar", re.IGNORECASE)


class Shapes:
    """What endpoints have said of schemas. For one `Provider`; in this process only."""

    def __init__(self) -> None:
        self._learned: dict[tuple[object, ...], frozenset[str]] = {}

    def seen(self, call: Call, endpoint: Endpoint) -> Endpoint:
        """``endpoint`` with the quirks that it has told of for this call's schema."""
        if call.schema is None or not self._learned:
            return endpoint
        learned = self._learned.get((*endpoint.key, call.schema.key))
        return replace(endpoint, quirks=endpoint.quirks | learned) if learned else endpoint

    def hear(self, call: Call, endpoint: Endpoint, error: BaseException) -> None:
        """``error`` came of asking there: if it refuses the schema, the next attempt asks in other words."""
        if call.schema is None or not isinstance(error, InvalidRequest) or not _NAMED.search(error.message):
            return
        known = self.seen(call, endpoint).quirks
        told = {NO_SCHEMA} if _THE_SCHEMA.search(error.message) else {NO_SCHEMA, NO_JSON}
        if NO_SCHEMA in known:
            told = {NO_JSON}
        if told <= known or (endpoint.wire != "openai" and NO_SCHEMA in known):
            return  # it was not asked in that way
        if len(self._learned) >= _MOST:
            self._learned.clear()
        self._learned[*endpoint.key, call.schema.key] = (known - endpoint.quirks) | told
        error.retryable, error.retry_after = True, 0.0
        error.next_step = "run it again: it is asked for in words then"
