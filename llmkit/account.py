"""Money set aside: accounts, and the holds on them.

A budget is a limit over an *account*: one scope in one window (today's, this session's, Ana's of this month), which
counts what was ``settled`` and what is ``held``. Before an attempt is sent, its worst case is held in every account it
counts towards; when it has ended, the hold is settled at what it really cost, or released if nothing was sent. Each of
these is one transaction over all accounts of the attempt, and a hold that does not fit into one of them is taken in
none. So ``settled + held ≤ limit`` at every commit, whoever else is at work.

USD are whole nano-dollars here, as in every store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmkit.errors import CallRejected

__all__ = [
    "NONE_AHEAD",
    "Account",
    "Accounts",
    "Balance",
    "Hold",
    "HoldRefused",
    "Provision",
    "Release",
    "Sent",
    "Settle",
    "Sums",
]


class Account(NamedTuple):
    """One scope in one window, with the limits that this process sets on it.

    Attributes:
        key: its name in the store, the same for everyone who shares it.
        scope: its name for people: ``day``, ``session``, ``user ana, month``.
        limit_nanos, limit_tokens: None where there is no limit of that unit; it is counted all the same.
        since: when the window began, epoch seconds. ``resets_at``: when it ends; None where it never does.
        user, tag, model, session: what of the ledger counts towards it, where not all does: a user, a ``key=value`` (or
            a ``key=`` for none), an endpoint's name, the owner of a session.
    """

    key: str
    scope: str
    limit_nanos: int | None = None
    limit_tokens: int | None = None
    since: float = 0.0
    resets_at: float | None = None
    user: str | None = None
    tag: str | None = None
    model: str | None = None
    session: str | None = None


class Balance(NamedTuple):
    """What an account has counted. ``unknown`` is inside ``settled``: worst cases of which nobody knows the end."""

    key: str
    settled_nanos: int = 0
    held_nanos: int = 0
    unknown_nanos: int = 0
    settled_tokens: int = 0
    held_tokens: int = 0
    unknown_tokens: int = 0


class Hold(NamedTuple):
    """Set the worst case of attempt ``number`` of a call aside, in all ``accounts`` or in none.

    Attributes:
        owner: the process that will settle it (`llmkit.state.owner`).
        expires: epoch seconds; the hold of an owner that cannot be asked is ended then.
        slot: where the owner notes that the request has been sent; None where it counts as sent from the beginning.
        balances: filled by the store: those of ``accounts``, in their order, this hold included.
    """

    request_id: str
    number: int
    accounts: tuple[Account, ...]
    nanos: int
    tokens: int
    owner: str
    expires: float
    slot: int | None
    balances: list[Balance]


class Sent(NamedTuple):
    """The request that a hold is for has been sent, so it may be billed from now on."""

    request_id: str
    number: int


class Settle(NamedTuple):
    """A hold becomes what was really spent. Settling what has been ended as ``unknown`` corrects it.

    ``nanos`` or ``tokens`` None: nobody knows how much it was, so the worst case that was held counts, as ``unknown``.
    """

    request_id: str
    number: int
    nanos: int | None
    tokens: int | None


class Release(NamedTuple):
    """A hold of which nothing was spent."""

    request_id: str
    number: int


class HoldRefused(Exception):
    """A hold does not fit into one of its accounts; nothing was changed. The budget layer makes a `BudgetExceeded` of it.

    Attributes:
        account: the first account that is too small. ``balance``: what it has counted, without this hold.
        unit: ``usd`` or ``tokens``, whichever does not fit.
    """

    def __init__(self, account: Account, balance: Balance, unit: str) -> None:
        super().__init__(f"{account.scope}: the {unit} do not fit")
        self.account = account
        self.balance = balance
        self.unit = unit

    @property
    def limit(self) -> int:
        """In nano-dollars, or tokens."""
        limit = self.account.limit_nanos if self.unit == "usd" else self.account.limit_tokens
        assert limit is not None
        return limit

    @property
    def settled(self) -> int:
        return self.balance.settled_nanos if self.unit == "usd" else self.balance.settled_tokens

    @property
    def held(self) -> int:
        return self.balance.held_nanos if self.unit == "usd" else self.balance.held_tokens


class Sums(NamedTuple):
    """Nano-dollars, and tokens."""

    nanos: int
    tokens: int


NONE_AHEAD = Sums(0, 0)


class Provision(NamedTuple):
    """What one attempt would have to be provided with.

    Attributes:
        nanos, input_tokens, output_tokens: the worst case, as it would be held; nano-dollars None where the price is unknown.
        accounts: that it counts towards. balances: what they have counted now, in their order.
        refusal: what the attempt would be refused with.
        waits: what it would wait for; None where there is room.
        warnings: what would be said although it goes on.
    """

    nanos: int | None
    input_tokens: int
    output_tokens: int
    accounts: tuple[Account, ...]
    balances: tuple[Balance, ...]
    refusal: CallRejected | None
    waits: str | None
    warnings: tuple[str, ...]


class Accounts(Protocol):
    """Accounts that are kept apart from the ledger, on a server that several machines share."""

    async def hold(self, hold: Hold) -> None:
        """Take the hold, and fill ``hold.balances``.

        Raises:
            HoldRefused: it does not fit; nothing was changed.
            StoreError: the server cannot be asked, or did not answer. The hold may have been taken: its lease ends it.
        """

    async def sent(self, hold: Hold) -> None:
        """Note that the request goes out now. Raises `StoreError` as `hold` does."""

    def end(self, ending: Settle | Release) -> None:
        """Settle or release, now or as soon as the server can be reached again; never fails, never waits."""

    async def balances(self, accounts: Sequence[Account]) -> list[Balance]:
        """What each has counted; zeros for one that nobody has used. Ends holds whose owner is gone first.

        Raises:
            StoreError: the server cannot be asked.
        """

    async def aclose(self) -> None:
        """Deliver what still waits to be ended, within a few seconds, and let go of connections."""
