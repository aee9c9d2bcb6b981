"""Budgets: which accounts an attempt counts towards, and what each of them has left.

A limit of the settings is over an account (`llmkit.account`): all calls, or those of a user, a tag or a model, in a
window of time. Windows are those of the *start of the call*, in the time zone that the settings state. The window
``session`` is this process, from the first use of a budget on; what is forked from it counts to it as well.
"""

from __future__ import annotations

import asyncio
import functools
import json
from datetime import UTC
from typing import TYPE_CHECKING, NamedTuple

from llmkit.account import Account
from llmkit.calendar import window
from llmkit.line import Line
from llmkit.models.prices import is_free, to_nanos
from llmkit.state.owner import current_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import tzinfo

    import pandas as pd

    from llmkit.account import Hold
    from llmkit.call import Call
    from llmkit.config import BudgetSettings, Limit
    from llmkit.endpoint import Endpoint
    from llmkit.ledger import Ledger

__all__ = ["COLUMNS", "Budgets", "Scopes", "session", "zone_of"]

COLUMNS: dict[str, str | None] = {
    "scope": "string",
    "kind": "string",
    "name": "string",
    "window": "string",
    "unit": "string",
    "limit": "float64",
    "spent": "float64",
    "held": "float64",
    "unknown": "float64",
    "left": "float64",
    "share": "float64",
    "resets_at": None,
}
"""Of `Budgets.frame`; the last one has the type of a moment in the stated time zone."""

MOST_NAMED = 1000  # users, tags or models that are listed where a limit is each one's own
MOST_KNOWN = 4096  # calls of so many kinds (endpoint, user, tags) are remembered; then all are looked up anew


class Scopes(NamedTuple):
    """The accounts that an attempt counts towards.

    Attributes:
        usd, tokens: whether one of them has a limit of that unit.
        usd_set: whether somebody asked for a limit in USD; is_set: for any limit. Else they are those by default.
    """

    accounts: tuple[Account, ...] = ()
    usd: bool = False
    tokens: bool = False
    usd_set: bool = False
    is_set: bool = False


_NOTHING = Scopes()


class _Era(NamedTuple):
    """What is known while no window begins or ends: from ``since`` to before ``until`` (epoch seconds)."""

    since: float
    until: float
    windows: dict[str, tuple[float, float | None]]
    known: dict[tuple[object, ...], tuple[Endpoint, Scopes]]


class Budgets:
    """The limits in force. Safe from any thread.

    Attributes:
        settings: replaced by `use`.
        line: those who wait until calls in flight give back what they do not need.
    """

    def __init__(self, settings: BudgetSettings) -> None:
        self.line = Line()
        self._session = session()
        self.use(settings)

    def use(self, settings: BudgetSettings) -> None:
        """From the next attempt on, these hold. What has been spent stays spent."""
        self.settings = settings
        self.zone = zone_of(settings.timezone)
        by: dict[str, list[Limit]] = {"all": [], "user": [], "tag": [], "model": []}
        for limit in settings.limits:
            by[limit.kind].append(limit)
        self._all = by["all"]
        self._users, self._models = _by_name(by["user"]), _by_name(by["model"])
        self._tags: dict[str, dict[str, list[Limit]]] = {}
        for limit in by["tag"]:
            key, _, value = limit.name.partition("=")
            self._tags.setdefault(key, {}).setdefault(value, []).append(limit)
        self._defaults = frozenset(
            self._key(limit, limit.name, "") for limit in by["all"] if limit.is_default and limit.tokens is None
        )
        self._era = _Era(0.0, 0.0, {}, {})

    def held(self, hold: Hold) -> None:
        """A hold has been taken: who waited for it waits no longer. From any thread."""
        self.line.leave(hold.request_id)

    def ended(self, hold: Hold) -> None:
        """A hold has ended, so there may be room for others. From any thread."""
        self.line.ended(hold.accounts)

    def of(self, call: Call, endpoint: Endpoint) -> Scopes:
        """What an attempt of ``call`` at ``endpoint`` counts towards. What is free counts where tokens are limited."""
        if not self.settings.limits:
            return _NOTHING
        at, era = call.started_at, self._era
        if not era.since <= at < era.until:
            era = self._era = self._era_of(at)
        names: tuple[object, ...] = (id(endpoint),)
        if self._users:
            names += (call.user,)
        if self._tags:
            names += tuple([call.tags.get(key) for key in self._tags])
        known = era.known.get(names)
        if known is not None and known[0] is endpoint:  # held, so that its id stays its own
            return known[1]
        if len(era.known) >= MOST_KNOWN:
            era.known.clear()
        scopes = self._scopes(self._limits_of(call, endpoint), era, free=is_free(endpoint))
        era.known[names] = (endpoint, scopes)
        return scopes

    def is_set(self, hold: Hold) -> bool:
        """Whether a limit on ``hold`` is one that somebody asked for."""
        return any(
            account.key.rpartition("/")[0] + "/" not in self._defaults
            for account in hold.accounts
            if account.limit_nanos is not None or account.limit_tokens is not None
        )

    def accounts(self, at: float, seen: Mapping[str, Iterable[str]]) -> list[tuple[Limit, str, Account]]:
        """Every account that a limit in force is over at ``at``: the limit, the name of what it is over, the account.

        Args:
            seen: by kind, the names (users, ``key=value``, endpoints' names) for which ``*`` is written out.
        """
        era = self._era_of(at)
        found: dict[str, tuple[Limit, str, Account]] = {}

        def add(limit: Limit, name: str) -> None:
            if limit.usd is not None or limit.tokens is not None:
                account = self._account(limit, name, era, free=False)
                found.setdefault(account.key, (limit, name, account))

        for limit in self._all:
            add(limit, "")
        for kind, limits in (("user", self._users), ("model", self._models)):
            for name in dict.fromkeys([*(name for name in limits if name != "*"), *seen.get(kind, ())]):
                for limit in _for(limits, name):
                    add(limit, name)
        for key, values in self._tags.items():
            others = [tag[len(key) + 1 :] for tag in seen.get("tag", ()) if tag.startswith(f"{key}=")]
            for value in dict.fromkeys([*(value for value in values if value != "*"), *others]):
                for limit in _for(values, value):
                    add(limit, f"{key}={value}")
        return list(found.values())

    def names_seen(self) -> dict[str, list[str]]:
        """By kind, the names in the accounts that this process has used in the windows of now."""
        seen: dict[str, dict[str, None]] = {"user": {}, "tag": {}, "model": {}}
        for _, scopes in list(self._era.known.values()):
            for account in scopes.accounts:
                for kind, name in (("user", account.user), ("tag", account.tag), ("model", account.model)):
                    if name is not None:
                        seen[kind][name] = None
        return {kind: list(names) for kind, names in seen.items()}

    def starred(self, kind: str) -> list[Limit]:
        """The limits that are each one's own."""
        if kind == "tag":
            return [limit for values in self._tags.values() for limit in values.get("*", ())]
        return list((self._users if kind == "user" else self._models).get("*", ()))

    def since(self, limit: Limit, at: float) -> float:
        """When the window of ``limit`` began, as seen at ``at``."""
        return self._era_of(at).windows[limit.window][0]

    async def frame(self, ledger: Ledger, at: float) -> pd.DataFrame:
        """Every limit in force at ``at`` and how far it is used, one row for each unit; of ``*`` each one seen.

        Columns: scope, kind, name, window, unit, limit, spent, held, unknown (it is in spent), left, share (of the limit
        that is spent), resets_at (in the stated time zone; NaT where it never does). USD, or tokens.

        Raises:
            StoreError: the accounts cannot be read.
        """
        import pandas as pd

        seen = await asyncio.to_thread(self._names, ledger.spend, at)
        found = self.accounts(at, seen)
        balances = await ledger.balances([account for _, _, account in found])
        records = []
        for (limit, name, account), balance in zip(found, balances, strict=True):
            common = (account.scope, limit.kind, name, limit.window)
            if account.limit_nanos is not None:
                usd = (account.limit_nanos, balance.settled_nanos, balance.held_nanos, balance.unknown_nanos)
                records.append((*common, "usd", *(number / 1e9 for number in _with_left(*usd)), account.resets_at))
            if account.limit_tokens is not None:
                tokens = (account.limit_tokens, balance.settled_tokens, balance.held_tokens, balance.unknown_tokens)
                records.append((*common, "tokens", *map(float, _with_left(*tokens)), account.resets_at))
        frame = pd.DataFrame.from_records(records, columns=[name for name in COLUMNS if name != "share"])
        frame.insert(len(COLUMNS) - 2, "share", frame["spent"] / frame["limit"])
        ends = pd.to_datetime(frame["resets_at"].astype("float64"), unit="s", utc=True)
        frame["resets_at"] = ends.astype("datetime64[us, UTC]").dt.tz_convert(self.zone)
        return frame.astype({name: kind for name, kind in COLUMNS.items() if kind is not None})

    def _names(self, spend: Callable[..., list[tuple[object, ...]]], at: float) -> dict[str, list[str]]:
        """By kind, whom the ledger and this process have seen in the windows of those limits that are each one's own."""
        seen = self.names_seen()
        for kind, column in (("user", "user"), ("tag", "tags"), ("model", "model")):
            starred = self.starred(kind)
            if not starred:
                seen[kind] = []
                continue
            since = min(self.since(limit, at) for limit in starred)
            names: Iterable[object] = [found for found, _ in spend(by=(column,), sums=("calls",), since=since)]
            if kind == "tag":
                names = [f"{key}={value}" for text in names for key, value in _tags(text).items()]
            seen[kind] = list(dict.fromkeys([*seen[kind], *(str(name) for name in names if name)]))[:MOST_NAMED]
        return seen

    # -- from limits to accounts -------------------------------------------------------------------------------------

    def _limits_of(self, call: Call, endpoint: Endpoint) -> list[tuple[Limit, str]]:
        found = [(limit, "") for limit in self._all]
        if call.user is not None and self._users:
            found += [(limit, call.user) for limit in _for(self._users, call.user)]
        for key, values in self._tags.items():
            value = call.tags.get(key)
            if value is not None:
                found += [(limit, f"{key}={value}") for limit in _for(values, str(value))]
        if self._models:
            found += [(limit, endpoint.name) for limit in _for(self._models, endpoint.name)]
        return found

    def _scopes(self, limits: list[tuple[Limit, str]], era: _Era, *, free: bool) -> Scopes:
        kept = [
            (limit, name) for limit, name in limits if limit.tokens is not None or (limit.usd is not None and not free)
        ]
        if not kept:
            return _NOTHING
        accounts = tuple(self._account(limit, name, era, free=free) for limit, name in kept)
        usd_set = not free and any(limit.usd is not None and not limit.is_default for limit, _ in kept)
        tokens = any(limit.tokens is not None for limit, _ in kept)
        return Scopes(accounts, any(a.limit_nanos is not None for a in accounts), tokens, usd_set, usd_set or tokens)

    def _account(self, limit: Limit, name: str, era: _Era, *, free: bool) -> Account:
        since, until = era.windows[limit.window]
        kind = limit.kind
        start = self._session if limit.window == "session" else str(int(since))
        return Account(
            key=self._key(limit, name, start),
            scope=limit.window if kind == "all" else f"{kind} {name}, {limit.window}",
            limit_nanos=None if limit.usd is None or free else to_nanos(limit.usd),
            limit_tokens=limit.tokens,
            since=since,
            resets_at=until,
            user=name if kind == "user" else None,
            tag=name if kind == "tag" else None,
            model=name if kind == "model" else None,
            session=self._session if limit.window == "session" else None,
        )

    @staticmethod
    def _key(limit: Limit, name: str, start: str) -> str:
        # The name may hold anything. What stands before and behind it does not, so no two accounts have one key.
        return f"{limit.kind}/{name}/{limit.window}/{start}"

    def _era_of(self, at: float) -> _Era:
        windows: dict[str, tuple[float, float | None]] = {}
        since, until = float("-inf"), float("inf")
        for name in {limit.window for limit in self.settings.limits}:
            if name in {"session", "total"}:
                windows[name] = (0.0, None)
                continue
            begin, end = window(name, at, self.zone)
            windows[name] = (begin, end)
            since, until = max(since, begin), min(until, end)
        return _Era(since, until, windows, {})


def _with_left(limit: int, spent: int, held: int, unknown: int) -> tuple[int, int, int, int, int]:
    return (limit, spent, held, unknown, max(0, limit - spent - held))


def _tags(text: object) -> dict[str, object]:
    """The tags that the ledger has as a JSON object; what it cannot be read from has none."""
    try:
        tags = json.loads(str(text))
    except ValueError:
        return {}
    return tags if isinstance(tags, dict) else {}


def _by_name(limits: list[Limit]) -> dict[str, list[Limit]]:
    found: dict[str, list[Limit]] = {}
    for limit in limits:
        found.setdefault(limit.name, []).append(limit)
    return found


def _for(limits: Mapping[str, list[Limit]], name: str) -> list[Limit]:
    """The limits of one name. Its own for a window stands in the place of everybody's (``*``)."""
    own = limits.get(name, []) if name != "*" else []
    taken = {limit.window for limit in own}
    return [*own, *(limit for limit in limits.get("*", ()) if limit.window not in taken)]


@functools.cache
def session() -> str:
    """The owner of this session: this process as it was when a budget was first used, so a forked child is in it too."""
    return current_owner()


# -- windows ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def zone_of(name: str) -> tzinfo:
    """The time zone ``name``. UTC is known without a data base."""
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)
