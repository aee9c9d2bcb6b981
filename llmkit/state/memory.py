"""A store that ends with the process: for tests, for ``[state] url = "memory"``, and where no file can be written."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Any

from llmkit.account import Balance, Hold, Release, Sent, Settle
from llmkit.errors import StoreError
from llmkit.lock import new_lock
from llmkit.state.holds import (
    HELD,
    RELEASED,
    Amounts,
    Held,
    abandoned,
    added,
    amount,
    check,
    counted,
    ended,
    has_tag,
    is_whole,
)
from llmkit.state.store import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    LOST_MESSAGE,
    MOST_SUMS,
    NEWEST_CALLS,
    QUARTER_S,
    SERVED,
    SPEND_KEYS,
    SPEND_SUMS,
    AttemptBegun,
    AttemptEnded,
    CallBegun,
    CallEnded,
    CallServed,
    DuplicateCall,
    fitting,
    fitting_account,
    fitting_text,
)
from llmkit.state.sums import check_columns, quarter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from llmkit.account import Account
    from llmkit.state.store import Change, IsGone, WasSent

__all__ = ["MemoryStore"]

Row = dict[str, Any]
Sums = tuple[int, ...]
SpendKey = tuple[int, str, str, str]

_NO_SUMS: Sums = (0,) * len(SPEND_SUMS)
_NEVER, _ALWAYS = -(2**40), 2**40
_MISSING: Any = object()


class MemoryStore:
    """Calls and attempts in dictionaries. Holds the newest ``max_calls`` (about 2 kB each); the oldest go first.

    Sums of spending, accounts and holds are kept for as long as the process lives.
    """

    def __init__(self, *, max_calls: int = 50_000, before: Callable[[Account], Amounts] | None = None) -> None:
        """``before`` says what an account has counted elsewhere, where this store goes on for another."""
        self.location = "memory"
        self._before = before
        self.max_calls = max_calls
        # What is in these is replaced and never changed, so that a commit can be undone.
        self._calls: dict[str, Row] = {}
        self._attempts: dict[str, dict[int, Row]] = {}
        self._counted_as: dict[str, str] = {}  # request_id of a call that has ended → the model it is in the sums of
        self._spend: dict[SpendKey, Sums] = {}
        self._accounts: dict[str, Amounts] = {}
        self._holds: dict[tuple[str, int], Held] = {}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._lock = new_lock()

    # -- writing -----------------------------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> None:
        fitted = [fitting(change) for change in changes]
        with self._lock:
            try:
                for change in fitted:
                    self._apply(change)
            except BaseException:
                for mapping, key, before in reversed(self._undo):
                    if before is _MISSING:
                        del mapping[key]
                    else:
                        mapping[key] = before
                raise
            finally:
                self._undo.clear()
            while len(self._calls) > self.max_calls:
                oldest = next(iter(self._calls))
                del self._calls[oldest]
                self._attempts.pop(oldest, None)
                self._counted_as.pop(oldest, None)

    def _put(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((mapping, key, mapping.get(key, _MISSING)))
        mapping[key] = value

    def _take_out(self, mapping: dict[Any, Any], key: Any) -> None:
        self._undo.append((mapping, key, mapping[key]))
        del mapping[key]

    def _apply(self, change: Change) -> None:
        if isinstance(change, CallBegun):
            self._begin(self._calls, change.request_id, CALL_COLUMNS, change)
        elif isinstance(change, AttemptBegun):
            if change.request_id not in self._attempts:
                self._put(self._attempts, change.request_id, {})
            self._begin(self._attempts[change.request_id], change.number, ATTEMPT_COLUMNS, change)
        elif isinstance(change, AttemptEnded):
            self._end_attempt(change.request_id, change.number, change._asdict())
        elif isinstance(change, CallEnded):
            self._end_call(change.request_id, change._asdict())
        elif isinstance(change, CallServed):
            self._begin(self._calls, change.request_id, CALL_COLUMNS, change)
            self._end_call(change.request_id, SERVED)
        elif isinstance(change, Hold):
            self._hold(change)
        elif isinstance(change, Sent):
            held = self._holds.get((change.request_id, change.number))
            if held is not None:
                self._put(self._holds, (change.request_id, change.number), held._replace(slot=None))
        else:
            self._end_hold(change)

    def _begin(
        self, rows: dict[Any, Row], key: Any, columns: Sequence[str], change: CallBegun | CallServed | AttemptBegun
    ) -> None:
        if key in rows:
            raise DuplicateCall("a call of this request_id was made already")
        self._put(rows, key, {**dict.fromkeys(columns), **change._asdict(), "status": "in_flight"})

    def _end_attempt(self, request_id: str, number: int, end: Row) -> None:
        rows = self._attempts.get(request_id, {})
        before = rows.get(number)
        if before is not None:
            after = {**before, **end}
            call = self._calls.get(request_id)
            if call is not None:
                self._add(call, _name(before), _of_attempt(before), -1)
                self._add(call, _name(after), _of_attempt(after))
            self._put(rows, number, after)

    def _end_call(self, request_id: str, end: Row) -> None:
        before = self._calls.get(request_id)
        if before is not None:
            after = {**before, **end}
            model = self._answered(after)
            self._add(before, self._counted_as.get(request_id, ""), _of_call(before), -1)
            self._add(after, model, _of_call(after))
            self._put(self._counted_as, request_id, model)
            self._put(self._calls, request_id, after)

    # -- sums --------------------------------------------------------------------------------------------------------

    def _answered(self, call: Row) -> str:
        """The endpoint of the call's last attempt; the model that answered, where there was none."""
        attempts = self._attempts.get(call["request_id"])
        if attempts:
            return _name(attempts[max(attempts)])
        provider, model = call["provider"], call["response_model"]
        return call["model"] if provider is None or model is None else f"{provider}:{model}"

    def _add(self, call: Row, model: str, sums: Row | None, sign: int = 1) -> None:
        if sums is None:
            return
        key = (quarter_of(call["started"], 0), model, call["user"] or "", call["tags"])
        before = self._spend.get(key, _NO_SUMS)
        after = tuple(b + sign * sums.get(name, 0) for b, name in zip(before, SPEND_SUMS, strict=True))
        self._put(self._spend, key, after)

    def spend(
        self,
        *,
        by: Sequence[str] = SPEND_KEYS,
        sums: Sequence[str] = SPEND_SUMS,
        windows: Sequence[float] | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> list[tuple[Any, ...]]:
        check_columns(by, sums, windows)
        first, last = quarter_of(since, _NEVER), quarter_of(until, _ALWAYS)
        edges = None if windows is None else [quarter_of(moment, 0) for moment in windows]
        picked = [SPEND_SUMS.index(name) for name in sums]
        found: dict[tuple[Any, ...], list[int]] = {}
        with self._lock:
            rows = list(self._spend.items())
        for key, counts in rows:
            if first <= key[0] < last:
                group = tuple(_shown(name, key) for name in by)
                if edges is not None:
                    window = bisect.bisect_right(edges, key[0]) - 1
                    if not 0 <= window < len(edges) - 1:
                        continue
                    group = (edges[window] * QUARTER_S, *group)
                total = found.setdefault(group, [0] * len(sums))
                for index, place in enumerate(picked):
                    total[index] += counts[place]
        if len(found) > MOST_SUMS:
            raise StoreError(f"there are more than {MOST_SUMS:,} sums for that", next_step="ask for a shorter time")
        return [(*group, *total) for group, total in found.items()]

    # -- accounts ----------------------------------------------------------------------------------------------------

    def _hold(self, change: Hold) -> None:
        if (change.request_id, change.number) in self._holds:
            raise DuplicateCall("there is a hold for this attempt already")
        if not change.accounts:
            change.balances.clear()
            return
        nanos, tokens = amount(change.nanos), amount(change.tokens)
        balances = {}
        for account in {account.key: account for account in change.accounts}.values():
            if account.key not in self._accounts:
                self._open(account)
            after = added(self._accounts[account.key], (0, nanos, 0, 0, tokens, 0))
            self._put(self._accounts, account.key, after)
            balances[account.key] = Balance(account.key, *after)
        in_order = [balances[account.key] for account in change.accounts]
        check(change, in_order)
        row = (change.request_id, change.number, tuple(balances), nanos, tokens)
        held = Held(*row, change.owner, change.expires, change.slot, HELD)
        self._put(self._holds, (held.request_id, held.number), held)
        change.balances[:] = in_order

    def _end_hold(self, ending: Settle | Release) -> None:
        key = (ending.request_id, ending.number)
        held = self._holds.get(key)
        if held is None:
            return
        change, kept = ended(held, ending)
        self._move(held.accounts, change)
        if kept is None:
            self._take_out(self._holds, key)
        else:
            self._put(self._holds, key, kept)

    def _abandon(self, owner: str, expired: float, was_sent: WasSent | None) -> int:
        """End the holds of ``owner`` whose lease was over at ``expired``; all of them, if that is infinite."""
        found = [each for each in self._holds.values() if each.owner == owner and each.state == HELD]
        late = [held for held in found if held.expires < expired]
        for held in late:
            went_out = held.slot is None or was_sent is None or was_sent(owner, held.slot)
            change, kept = abandoned(held, sent=went_out)
            self._move(held.accounts, change)
            self._put(self._holds, (held.request_id, held.number), kept)
            row = self._attempts.get(held.request_id, {}).get(held.number)
            if row is not None and not went_out and expired == math.inf and row["status"] == "in_flight":
                lost = {"status": "lost", "maybe_billed": 0, "cost_nanos": 0}
                self._end_attempt(held.request_id, held.number, lost)
        return len(late)

    def _move(self, keys: Sequence[str], change: Amounts) -> None:
        for key in keys:
            if key in self._accounts:
                self._put(self._accounts, key, added(self._accounts[key], change))

    def _open(self, account: Account) -> None:
        self._put(self._accounts, account.key, self._beginning(account))
        for held in list(self._counting(account)):
            keys = (*held.accounts, account.key)
            self._put(self._holds, (held.request_id, held.number), held._replace(accounts=keys))

    def _beginning(self, account: Account) -> Amounts:
        """What an account that nobody has used yet begins with."""
        amounts = self._in_ledger(account)
        if self._before is not None:
            amounts = added(amounts, self._before(account))
        for held in self._counting(account):
            amounts = added(amounts, counted(held))
        return amounts

    def _in_ledger(self, account: Account) -> Amounts:
        """What the ended attempts cost that count towards the account."""
        nanos = tokens = 0
        if is_whole(account):
            first, last = quarter_of(account.since, _NEVER), quarter_of(account.resets_at, _ALWAYS)
            for (quarter, model, user, tags), counts in self._spend.items():
                if (
                    first <= quarter < last
                    and account.user in (None, user)
                    and account.model in (None, model)
                    and has_tag(account, tags)
                ):
                    sums = dict(zip(SPEND_SUMS, counts, strict=True))
                    nanos += sums["cost_nanos"]
                    tokens += sums["input_tokens"] + sums["output_tokens"]
        else:
            for attempt in self._counted_attempts(account):
                sums = _of_attempt(attempt) or {}
                nanos += sums.get("cost_nanos", 0)
                tokens += sums.get("input_tokens", 0) + sums.get("output_tokens", 0)
        return (nanos, 0, 0, tokens, 0, 0)

    def _counted_attempts(self, account: Account) -> Iterator[Row]:
        for request_id, call in self._calls.items():
            for attempt in self._attempts.get(request_id, {}).values():
                if _counts(account, call, attempt):
                    yield attempt

    def _counting(self, account: Account) -> Iterator[Held]:
        """The holds of attempts that count towards the account and are not in the ledger's sums yet."""
        for held in list(self._holds.values()):
            call = self._calls.get(held.request_id)
            attempt = self._attempts.get(held.request_id, {}).get(held.number)
            if call is not None and attempt is not None and _counts(account, call, attempt):
                unknown = attempt["cost_nanos"] is None and attempt["input_tokens"] is None
                if attempt["status"] == "in_flight" if held.state == HELD else held.state != RELEASED and unknown:
                    yield held

    def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        fitted = [fitting_account(account) for account in accounts]
        with self._lock:
            known = [self._accounts.get(account.key) or self._beginning(account) for account in fitted]
        return [Balance(account.key, *amounts) for account, amounts in zip(fitted, known, strict=True)]

    def reap(self, now: float, *, is_gone: IsGone, was_sent: WasSent) -> int:
        with self._lock:
            owners = {held.owner for held in self._holds.values() if held.state == HELD}
        gone = {owner: is_gone(owner) for owner in owners}
        reaped = 0
        with self._lock:
            for owner, verdict in gone.items():
                if verdict:
                    reaped += self._lose(owner, was_sent)[1]
                elif verdict is None:
                    reaped += self._abandon(owner, now, was_sent)
            self._undo.clear()
        return reaped

    # -- reading -----------------------------------------------------------------------------------------------------

    def calls(self, *, limit: int | None = None, since: float | None = None, beginning: str | None = None) -> list[Row]:
        begin = fitting_text(beginning or "")
        with self._lock:
            rows = [
                dict(row)
                for name, row in self._calls.items()
                if (since is None or row["started"] >= since) and name.startswith(begin)
            ]
        rows.sort(key=lambda row: (row["started"], row["request_id"]))
        return rows if limit is None else rows[max(0, len(rows) - limit) :]

    def attempts(self, request_id: str) -> list[Row]:
        with self._lock:
            rows = [dict(row) for row in self._attempts.get(fitting_text(request_id), {}).values()]
        return sorted(rows, key=lambda row: row["number"])

    def outputs(self, endpoint: str, template: str | None, limit: int) -> list[tuple[float, int]]:
        with self._lock:
            calls = sorted(self._calls.items(), key=lambda each: each[1]["started"], reverse=True)
            rows = [
                (row["started"], row["output_tokens"])
                for name, row in (calls[:NEWEST_CALLS] if template is None else calls)
                if row["status"] == "complete"
                and row["attempts"]
                and row["output_tokens"] is not None
                and row["source"] != "degraded"
                and (template is None or row["template"] == fitting_text(template))
                and self._counted_as.get(name) == fitting_text(endpoint)
            ]
        return sorted(rows, reverse=True)[:limit]

    def page(self, after: tuple[float, str] | None, limit: int) -> list[tuple[Row, list[Row]]]:
        calls = [row for row in self.calls() if after is None or (row["started"], row["request_id"]) > after]
        return [(row, self.attempts(row["request_id"])) for row in calls[:limit]]

    def owners(self) -> dict[str, float]:
        newest: dict[str, float] = {}
        with self._lock:
            for row in self._calls.values():
                if row["status"] == "in_flight":
                    newest[row["owner"]] = max(row["started"], newest.get(row["owner"], row["started"]))
        return newest

    # -- endings -----------------------------------------------------------------------------------------------------

    def mark_lost(self, owner: str, was_sent: WasSent | None = None) -> int:
        with self._lock:
            lost, _ = self._lose(owner, was_sent)
            self._undo.clear()
        return lost

    def _lose(self, owner: str, was_sent: WasSent | None) -> tuple[int, int]:
        """End all that ``owner`` has begun. Returns how many calls were lost, and how many holds ended."""
        holds = self._abandon(owner, math.inf, was_sent)
        lost = [row for row in self._calls.values() if row["status"] == "in_flight" and row["owner"] == owner]
        for call in lost:
            request_id = call["request_id"]
            attempts = self._attempts.get(request_id, {})
            for number, row in list(attempts.items()):
                if row["status"] == "in_flight":
                    self._end_attempt(request_id, number, {"status": "lost", "maybe_billed": 1})
            costs = [row["cost_nanos"] for row in attempts.values()]
            end = {"status": "lost", "message": LOST_MESSAGE, "attempts": len(attempts)}
            self._end_call(request_id, {**end, "cost_nanos": None if None in costs else sum(costs)})
        return len(lost), holds

    def close(self) -> None:
        """There is nothing to let go of; the rows stay readable."""


def _name(attempt: Row) -> str:
    return f"{attempt['provider']}:{attempt['model']}"


def _counts(account: Account, call: Row, attempt: Row) -> bool:
    """Whether an attempt counts towards the account."""
    return (
        account.since <= call["started"] < (math.inf if account.resets_at is None else account.resets_at)
        and account.user in (None, call["user"])
        and account.model in (None, _name(attempt))
        and account.session in (None, call["owner"])
        and has_tag(account, call["tags"])
    )


def _of_attempt(row: Row) -> Row | None:
    """What an attempt adds to the sums; None before its end."""
    if row["status"] == "in_flight":
        return None
    counted_columns = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")
    sums = {name: amount(row[name] or 0) for name in (*counted_columns, "cost_nanos")}
    unpriced, maybe_billed = int(row["cost_nanos"] is None), int(bool(row["maybe_billed"]))
    return {**sums, "attempts": 1, "unpriced": unpriced, "maybe_billed": maybe_billed}


def _of_call(row: Row) -> Row | None:
    """What a call adds to the sums; None before its end."""
    return None if row["status"] == "in_flight" else {"calls": 1, "saved_nanos": amount(row["saved_nanos"] or 0)}


def _shown(name: str, key: SpendKey) -> Any:
    return key[0] * QUARTER_S if name == "quarter" else key[SPEND_KEYS.index(name)]
