"""A store that ends with the process: for tests, for ``[state] url = "memory"``, and where no file can be written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    LOST_MESSAGE,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    DuplicateCall,
    fitting,
    fitting_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.state.store import CallEnded, Change

__all__ = ["MemoryStore"]

Row = dict[str, Any]


class MemoryStore:
    """Calls and attempts in dictionaries. Holds the newest ``max_calls`` (about 2 kB each); the oldest go first."""

    def __init__(self, *, max_calls: int = 50_000) -> None:
        self.location = "memory"
        self.max_calls = max_calls
        self._calls: dict[str, Row] = {}
        self._attempts: dict[str, dict[int, Row]] = {}
        self._lock = threading.Lock()

    def commit(self, changes: Sequence[Change]) -> None:
        fitted = [fitting(change) for change in changes]
        with self._lock:
            if any(self._is_known(change) for change in fitted):
                raise DuplicateCall("a call of this request_id was made already")
            for change in fitted:
                self._apply(change)

    def _is_known(self, change: Change) -> bool:
        if isinstance(change, AttemptBegun):
            return change.number in self._attempts.get(change.request_id, ())
        return isinstance(change, CallBegun) and change.request_id in self._calls

    def _apply(self, change: Change) -> None:
        if isinstance(change, CallBegun):
            self._begin_call(change)
        elif isinstance(change, AttemptBegun):
            row = {**dict.fromkeys(ATTEMPT_COLUMNS), **change._asdict(), "status": "in_flight"}
            self._attempts.setdefault(change.request_id, {})[change.number] = row
        elif isinstance(change, AttemptEnded):
            _end(self._attempts.get(change.request_id, {}).get(change.number), change)
        else:
            _end(self._calls.get(change.request_id), change)

    def _begin_call(self, change: CallBegun) -> None:
        row = {**dict.fromkeys(CALL_COLUMNS), **change._asdict(), "status": "in_flight"}
        self._calls[change.request_id] = row
        while len(self._calls) > self.max_calls:
            oldest = next(iter(self._calls))
            del self._calls[oldest]
            self._attempts.pop(oldest, None)

    def calls(self, *, limit: int | None = None, since: float | None = None) -> list[Row]:
        with self._lock:
            rows = [dict(row) for row in self._calls.values() if since is None or row["started"] >= since]
        rows.sort(key=lambda row: (row["started"], row["request_id"]))
        return rows if limit is None else rows[max(0, len(rows) - limit) :]

    def attempts(self, request_id: str) -> list[Row]:
        with self._lock:
            rows = [dict(row) for row in self._attempts.get(fitting_text(request_id), {}).values()]
        return sorted(rows, key=lambda row: row["number"])

    def owners(self) -> dict[str, float]:
        newest: dict[str, float] = {}
        with self._lock:
            for row in self._calls.values():
                if row["status"] == "in_flight":
                    newest[row["owner"]] = max(row["started"], newest.get(row["owner"], row["started"]))
        return newest

    def mark_lost(self, owner: str) -> int:
        with self._lock:
            lost = [row for row in self._calls.values() if row["status"] == "in_flight" and row["owner"] == owner]
            for row in lost:
                self._lose(row)
        return len(lost)

    def _lose(self, call: Row) -> None:
        attempts = self._attempts.get(call["request_id"], {}).values()
        costs = [row["cost_nanos"] for row in attempts]
        cost = None if None in costs else sum(costs)
        call.update(status="lost", message=LOST_MESSAGE, attempts=len(attempts), cost_nanos=cost)
        for row in attempts:
            if row["status"] == "in_flight":
                row.update(status="lost", maybe_billed=1)

    def close(self) -> None:
        """There is nothing to let go of; the rows stay readable."""


def _end(row: Row | None, change: AttemptEnded | CallEnded) -> None:
    if row is not None:
        row.update(change._asdict())
