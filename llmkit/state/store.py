"""The protocol of a store, and what is written to one.

A store takes *changes*: small records of something that began or ended. ``commit`` applies a list of them as one
transaction, so that what belongs together is never seen apart; a new kind of fact is a new kind of change. What is set
aside, spent and given back is among them (`llmkit.account`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmkit.account import Account, Hold, Release, Sent, Settle
from llmkit.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from llmkit.account import Balance

__all__ = [
    "ATTEMPT_COLUMNS",
    "CALL_COLUMNS",
    "NEWEST_CALLS",
    "QUARTER_S",
    "SERVED",
    "SPEND_KEYS",
    "SPEND_SUMS",
    "AttemptBegun",
    "AttemptEnded",
    "CallBegun",
    "CallEnded",
    "CallServed",
    "Change",
    "DuplicateCall",
    "Store",
    "data_folder",
    "fitting",
    "fitting_account",
    "fitting_text",
    "is_in_own_folder",
    "is_redis",
    "ledger_path",
    "open_store",
    "path_beside",
]

FILE_NAME = "ledger.sqlite3"
LARGEST = 2**63 - 1
NEWEST_CALLS = 5_000  # among so many the answers of a model are looked for; an index of them would slow each call
MOST_SUMS = 500_000  # more rows of sums than these are no overview
LOST_MESSAGE = "its process ended before the call did; what was sent may be billed"


# Of each record, the fields are the columns: the SQL is made from them, and they are its parameters in order. Only
# what is known at the time is in it, and truth is 0 or 1, since a None or a bool costs a third of a microsecond.


class CallBegun(NamedTuple):
    """A call came in. ``started`` is in epoch seconds, ``tags`` a JSON object, ``model`` as it was asked for.

    ``template``: a digest of the text that its prompt was made from (`llmkit.call.digest_of`); None where none was named.
    """

    request_id: str
    started: float
    user: str | None
    tags: str
    model: str
    owner: str
    template: str | None = None


class AttemptBegun(NamedTuple):
    """A request is about to be sent. ``number`` is 1-based within the call."""

    request_id: str
    number: int
    started: float
    provider: str
    model: str
    base_url: str | None


class AttemptEnded(NamedTuple):
    """An attempt ended. Tokens as in `llmkit.reply.Usage`; None is unknown, never nothing; cost in nano-dollars.

    ``price``: the USD per million tokens that the cost was made with, as JSON; ``price_date``: the ISO date of the price
    table that they are from. None where there was no price, and where it has no date.
    """

    status: str
    input_tokens: int | None
    cached_input_tokens: int | None
    cache_write_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    estimated: int | None
    cost_nanos: int | None
    price_source: str | None
    price: str | None
    price_date: str | None
    latency_s: float
    time_to_first_token_s: float | None
    http_status: int | None
    provider_request_id: str | None
    finish_reason: str | None
    maybe_billed: int
    error: str | None
    message: str | None
    request_id: str
    number: int


class CallEnded(NamedTuple):
    """A call ended. Of tokens and cost the same holds as of an attempt's.

    ``saved_nanos``: what a stored or shared answer would have cost; None where nothing was saved, or nobody knows.
    """

    status: str
    response_model: str | None
    provider: str | None
    source: str | None
    input_tokens: int | None
    cached_input_tokens: int | None
    cache_write_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    estimated: int | None
    cost_nanos: int | None
    saved_nanos: int | None
    latency_s: float | None
    time_to_first_token_s: float | None
    attempts: int
    retries: int
    finish_reason: str | None
    error: str | None
    message: str | None
    request_id: str


class CallServed(NamedTuple):
    """A call that came in and was answered whole without an attempt, both at once. The other columns are `SERVED`."""

    request_id: str
    started: float
    user: str | None
    tags: str
    model: str
    owner: str
    response_model: str | None
    provider: str | None
    source: str
    saved_nanos: int | None
    latency_s: float | None
    time_to_first_token_s: float | None
    finish_reason: str | None
    template: str | None = None


SERVED = {
    "status": "complete",
    "input_tokens": 0,
    "cached_input_tokens": 0,
    "cache_write_tokens": 0,
    "output_tokens": 0,
    "reasoning_tokens": 0,
    "estimated": 0,
    "cost_nanos": 0,
    "attempts": 0,
    "retries": 0,
}
"""What a call was that nobody was asked for."""


class DuplicateCall(StoreError):
    """A call with this request_id is in the store already; nothing of the commit was applied."""

    default_next_step = "give each call a request_id of its own, or none"


Change = CallBegun | AttemptBegun | AttemptEnded | CallEnded | CallServed | Hold | Sent | Settle | Release

CALL_COLUMNS = tuple(dict.fromkeys((*CallBegun._fields, *CallEnded._fields)))
ATTEMPT_COLUMNS = tuple(dict.fromkeys((*AttemptBegun._fields, *AttemptEnded._fields)))

QUARTER_S = 900
"""What one sum of spending is for, in seconds: every time zone is whole quarters of an hour away from UTC."""

SPEND_KEYS = ("quarter", "model", "user", "tags")
"""What spending is summed by: the beginning (epoch seconds) of the quarter of an hour in which the *call* started, the
endpoint's name, the user ("" for none), and the tags as a JSON object."""

SPEND_SUMS = (
    "calls",
    "attempts",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cost_nanos",
    "saved_nanos",
    "unpriced",
    "maybe_billed",
)
"""``calls`` and ``attempts`` that have ended, what is known of their tokens and cost, the ``unpriced`` attempts whose
cost is not known, and those that were ``maybe_billed``."""

IsGone = Callable[[str], bool | None]  # of an owner
WasSent = Callable[[str, int | None], bool]  # of an owner and a slot


class Store(Protocol):
    """Where calls and attempts are kept. Safe to use from any thread and any event loop.

    A call or attempt that has begun has the status ``in_flight`` until it ends, or until it is found to be ``lost``.

    Attributes:
        location: what it is, for people: a path, or ``memory``.
    """

    location: str

    def commit(self, changes: Sequence[Change]) -> Future[None] | None:
        """Apply ``changes`` as one transaction, without ever waiting for a lock that another process holds.

        Returns:
            None when it is done, which is the rule; else a future of its end: the store is busy, and a thread of its
            own goes on trying, in the order of the commits. Cancelling the future does nothing.

        A `Hold` takes what it is for out of all its accounts, and its ``balances`` are filled; an account that is used
        for the first time begins with what the ledger has for it. An ending (`Settle`, `Release`) of a hold that is not
        there any more does nothing, and one of a hold that was ended as unknown corrects that.

        Raises:
            DuplicateCall: a call, attempt or hold has begun before.
            HoldRefused: a hold does not fit.
            StoreError: it cannot be written.

        Nothing of the commit was applied then. The future fails with the same.
        """

    def calls(
        self, *, limit: int | None = None, since: float | None = None, beginning: str | None = None
    ) -> list[dict[str, Any]]:
        """The newest ``limit`` calls that started at ``since`` (epoch seconds) or later, as `CALL_COLUMNS`, newest last.

        ``beginning``: only those whose request_id begins so.

        Raises:
            StoreError: it cannot be read.
        """

    def attempts(self, request_id: str) -> list[dict[str, Any]]:
        """The attempts of one call in their order, as `ATTEMPT_COLUMNS`.

        Raises:
            StoreError: it cannot be read.
        """

    def outputs(self, endpoint: str, template: str | None, limit: int) -> list[tuple[float, int]]:
        """When the newest ``limit`` answers of ``endpoint`` were asked for (epoch seconds), and their output tokens.

        Of whole answers that somebody was asked for: none from a cache. ``template``: only those of prompts that were
        made from it, by its digest; without one, only those among the newest `NEWEST_CALLS` calls. Newest first; as
        quick among a million calls as among a few.

        Raises:
            StoreError: it cannot be read.
        """

    def page(self, after: tuple[float, str] | None, limit: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The next ``limit`` calls in the order of their start, each with its attempts, oldest first.

        ``after``: ``started`` and ``request_id`` of the last one of the page before; None for the first page.

        Raises:
            StoreError: it cannot be read.
        """

    def owners(self) -> dict[str, float]:
        """Who has calls in flight, and when the newest of them started (epoch seconds)."""

    def mark_lost(self, owner: str, was_sent: WasSent | None = None) -> int:
        """Every call in flight of ``owner`` becomes ``lost``, and its holds end with it. Returns how many calls.

        Its open attempt is ``maybe_billed`` and of unknown cost, and so is the call; unless there was a hold and it is
        known, by ``was_sent(owner, slot)``, that the request never went out.
        """

    def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        """What each has counted, in their order; what the ledger has for one that nobody has used yet.

        Raises:
            StoreError: it cannot be read.
        """

    def reap(self, now: float, *, is_gone: IsGone, was_sent: WasSent) -> int:
        """End the holds that nobody will end any more. Returns how many.

        Those of an owner that is gone end together with its calls (see `mark_lost`). Where that cannot be known
        (``is_gone(owner)`` is None), a hold ends when its lease has expired at ``now`` (epoch seconds). One that was
        sent is settled at its worst case, as unknown; one that was not is released. Both are kept on record, so that
        the owner may still say what it really was. Accounts of windows that ended long ago are removed.

        Raises:
            StoreError: it cannot be written.
        """

    def spend(
        self,
        *,
        by: Sequence[str] = SPEND_KEYS,
        sums: Sequence[str] = SPEND_SUMS,
        windows: Sequence[float] | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> list[tuple[Any, ...]]:
        """The sums of spending, as tuples of ``by`` (some of `SPEND_KEYS`) and then ``sums`` (some of `SPEND_SUMS`).

        Args:
            windows: ascending beginnings of windows, and the end of the last one, in epoch seconds: the sums are for
                each window, whose beginning stands first in the tuple. Windows without any are left out.
            since, until: only what started from then on, and before then, in epoch seconds.

        All times are rounded down to whole quarters of an hour. Nothing is said of the order.

        Raises:
            ValueError: a column that is none.
            StoreError: it cannot be read, or there are more than `MOST_SUMS` combinations.
        """

    def close(self) -> None:
        """Finish what waits, and let go of files and threads. A later use opens it again."""


def fitting(change: Change) -> Change:
    """The same change with values that every store can hold: 64-bit integers, and text that is valid Unicode."""
    if isinstance(change, Hold):
        accounts = tuple(fitting_account(account) for account in change.accounts)
        fitted = Hold._make(_fit(value) for value in change._replace(accounts=(), balances=[]))
        return fitted._replace(accounts=accounts, balances=change.balances)  # the list is where the answer goes
    return type(change)._make(_fit(value) for value in change)


def fitting_account(account: Account) -> Account:
    """The same account with values that every store can hold; see `fitting`."""
    return Account._make(_fit(value) for value in account)


def _fit(value: Any) -> Any:
    if isinstance(value, int):
        return max(-LARGEST, min(LARGEST, value))
    if isinstance(value, str):
        return fitting_text(value)
    return value if value is None or isinstance(value, float) else str(value)


def fitting_text(text: str) -> str:
    """The same text with a question mark for each lone surrogate."""
    return text.encode("utf-8", "replace").decode("utf-8")


def data_folder() -> Path:
    """The user's data folder for llmkit; the variable ``LLMKIT_DATA_DIR`` overrides it."""
    if chosen := os.environ.get("LLMKIT_DATA_DIR"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("llmkit", appauthor=False))


def is_redis(url: str) -> bool:
    """Whether ``url`` names a Redis server, where what several machines share is kept."""
    return url.startswith(("redis://", "rediss://"))


def ledger_path(url: str) -> Path | None:
    """The file that ``url`` names; None for ``memory``.

    ``sqlite`` is a file in the user's data folder; ``sqlite:///folder/file`` is that absolute path (``~`` works). With
    ``redis://…`` the ledger is the same file: a record is never lost to a network.

    Raises:
        ConfigError: anything else.
    """
    if url == "memory":
        return None
    if url == "sqlite" or is_redis(url):
        return data_folder() / FILE_NAME
    path = Path(url.removeprefix("sqlite:///")).expanduser()
    if not url.startswith("sqlite:///") or "\0" in url or path in {Path(), Path("~")}:
        raise ConfigError(
            f'[state] url is "{_shown(url)}"',
            next_step='use "sqlite", "sqlite:///path", "memory" or "redis://HOST:PORT/NUMBER"',
        )
    return path if path.is_absolute() else Path("/") / path


def path_beside(url: str, kind: str) -> Path | None:
    """The file of ``kind`` (``cache``, ``answers`` …) that belongs to the ledger at ``url``; None where it has no file.

    Raises:
        ConfigError: there is no such store.
    """
    path = ledger_path(url)
    return None if path is None else path.with_name(f"{path.stem}.{kind}.sqlite3")


def is_in_own_folder(url: str) -> bool:
    """Whether the files at ``url`` are in a folder that is llmkit's own, not one that somebody chose."""
    return not url.startswith("sqlite:///") and "LLMKIT_DATA_DIR" not in os.environ


def _shown(url: str) -> str:
    """A URL that is not understood may hold a password."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}://…" if mark and rest else url[:80]


def open_store(url: str) -> Store:
    """Open the store that ``url`` names; waits for its files, so not for an event loop's thread.

    Raises:
        ConfigError: there is no such store.
        StoreError: it cannot be opened.
    """
    path = ledger_path(url)
    if path is None:
        from llmkit.state.memory import MemoryStore

        return MemoryStore()
    from llmkit.state.sqlite import SQLiteStore

    return SQLiteStore(path, private_folder=is_in_own_folder(url))
