"""Frozen settings, read once: ``llmkit.toml``, then ``LLMKIT_*`` variables, then arguments. The later wins.

* **The file** is the first ``llmkit.toml``, or ``pyproject.toml`` with ``[tool.llmkit]``, from the start folder upwards,
  up to the home folder or the root; ``llmkit.toml`` wins within one folder. Settings of several files are never mixed.
* **A variable** is ``LLMKIT_`` and the setting's path: ``LLMKIT_MODEL``, ``LLMKIT_TIMEOUT_TOTAL=60``,
  ``LLMKIT_BUDGET_REQUEST_USD=0.1``. ``LLMKIT_OFFLINE=1`` keeps every call on this machine.
* **An argument** is the same path in small letters (``timeout_total=60``), or a whole table (``timeout={"total": 60}``;
  ``timeout=60`` and ``timeout="chat"`` are short for its ``total`` and its ``preset``). None means: not given.

``"off"`` lifts a limit. A setting that is read but does nothing yet is named in `Config.notices`. Keys never stand in
settings, only the names of the variables that hold them.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from llmkit.call import Timeouts
from llmkit.endpoint import is_loopback
from llmkit.environment import Environment
from llmkit.errors import ConfigError
from llmkit.providers.catalog import CATALOG, ProviderEntry, moved
from llmkit.providers.discovery import Default, find
from llmkit.route import Routes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmkit.endpoint import Link
    from llmkit.settings import Place

__all__ = [
    "PRESETS",
    "AlertSettings",
    "BreakerSettings",
    "BudgetSettings",
    "CacheSettings",
    "Config",
    "Default",
    "Limit",
    "NotebookSettings",
    "RetrySettings",
]

MAX_FILE_BYTES = 1_000_000
FILE, PROJECT = "llmkit.toml", "pyproject.toml"
PREFIX = "LLMKIT_"

_ENVIRON = Environment(os.environ)

# Read elsewhere, so neither settings nor mistakes.
_OTHER_VARIABLES = frozenset(
    {"LLMKIT_DATA_DIR", "LLMKIT_DISPLAY", "LLMKIT_RECORD", "LLMKIT_REPLAY", "LLMKIT_REDIS_PASSWORD"}
)

PRESETS = {
    "chat": Timeouts(connect=5.0, first_token=10.0, idle=10.0, total=30.0),
    "code": Timeouts(connect=5.0, first_token=30.0, idle=30.0, total=60.0),
}
"""Time limits by what is waited for: somebody who chats, or code that is written."""


WINDOWS = ("session", "hour", "day", "week", "month", "total")


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be spent in each ``window`` (of `WINDOWS`), by whom or for what; None is no limit of that unit.

    Attributes:
        kind: ``all``, ``user``, ``tag`` or ``model``.
        name: which of that kind: a user, ``key=value``, an endpoint's name; ``*`` and ``key=*`` set each one its own.
        is_default: nobody asked for ``usd``: it is one of those that hold without asking.
    """

    window: str
    usd: Decimal | None = None
    tokens: int | None = None
    kind: str = "all"
    name: str = ""
    is_default: bool = False


_DEFAULT_LIMITS = {"session": Decimal(5), "day": Decimal(20)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSettings:
    """``[budget]``: what one request may cost, all its attempts together (None: no cap), and what all of them may.

    Attributes:
        request_usd_set: tells a cap that somebody asked for from the one that holds by default.
        limits: of sessions, hours, days, … as many as there are.
        at_limit: ``error``, ``downgrade`` (to a cheaper link of the chain, else an error) or ``warn`` (and go on).
        warn_at: the share of a limit from which on there is a warning.
        timezone: where hours, days, weeks (from Monday) and months begin.
    """

    request_usd: Decimal | None = Decimal("0.50")
    request_tokens: int | None = None
    request_usd_set: bool = False
    limits: tuple[Limit, ...] = tuple(Limit(window, usd, is_default=True) for window, usd in _DEFAULT_LIMITS.items())
    at_limit: str = "error"
    warn_at: float = 0.8
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """``[cache]``: which answers are kept, how long, and for whom.

    Attributes:
        ttl_s: how long an answer is good, in seconds; None for ever.
        max_bytes: of the store; memory_bytes: of what this process keeps beside it.
        namespace: ``shared``, ``user`` (each user's answers are his own) or ``tag:NAME`` (by the value of that tag).
        persist: whether answers are written anywhere at all; else they end with the process.
    """

    enabled: bool = True
    ttl_s: int | None = 7 * 86_400
    max_bytes: int = 10**9
    memory_bytes: int = 64 * 10**6
    namespace: str = "shared"
    persist: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertSettings:
    """``[alerts]``: spending that somebody should hear of; None is never.

    Attributes:
        call_usd, hour_usd, day_usd: in USD.
        jump: this hour against the usual one: how many times as much.
    """

    call_usd: Decimal | None = Decimal(1)
    hour_usd: Decimal | None = Decimal(5)
    day_usd: Decimal | None = Decimal(15)
    jump: float | None = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NotebookSettings:
    """``[notebook]``: cells that say nothing else, where ``%config`` says nothing either.

    Attributes:
        keep: whether what cells asked and were answered is written down, so that it can be shown again; else it is known
            as long as the kernel lives. `CacheSettings.persist` off has the same effect.
        format, display, traceback: how answers and errors are shown; display None: as ``LLMKIT_DISPLAY`` says.
        system, temperature, max_tokens, user: options of cells; see `llmkit.options.Options`.
    """

    keep: bool = True
    format: str = "markdown"
    display: str | None = None
    traceback: bool = False
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    user: str | None = None

    def options(self) -> dict[str, Any]:
        """What of it is said with a call."""
        named = {name: getattr(self, name) for name in ("system", "temperature", "max_tokens", "user")}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """``[retry]``: ``attempts`` in all; the first wait is up to ``initial`` seconds, no wait is longer than ``maximum``."""

    attempts: int = 4
    initial: float = 0.5
    maximum: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """``[breaker]``: when an endpoint is left alone, and for how long.

    Attributes:
        failures: in a row, to open.
        rate: share of failures among the calls of the last ``window_s`` seconds, to open, from ``minimum_calls`` on.
        open_s: seconds until the first probe.
        probes: calls let through at once while half open.
        successes: of probes in a row, to close.
    """

    failures: int = 5
    rate: float = 0.5
    window_s: float = 60.0
    minimum_calls: int = 5
    open_s: float = 60.0
    probes: int = 1
    successes: int = 2


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Config:
    """Settings, checked and frozen. Made by `load` or `of`; changed copies by `with_`.

    Attributes:
        model: the default model as it was set; None where no setting names one (see `default_model`).
        offline: no call may leave this machine.
        providers: every provider by its name, the user's own included.
        file: the file that was read; None where there was none.
        notices: settings that were read and do nothing in this version, one sentence each.
        environ: where the keys are looked up.
        tiers: the models of ``simple``, ``medium`` and ``hard`` work, as far as they are set.
    """

    model: str | None
    offline: bool
    budget: BudgetSettings
    timeouts: Timeouts
    retry: RetrySettings
    breaker: BreakerSettings
    cache: CacheSettings
    alerts: AlertSettings
    notebook: NotebookSettings
    degraded_text: str | None
    state_url: str
    state_on_failure: str
    providers: Mapping[str, ProviderEntry]
    file: Path | None
    notices: tuple[str, ...]
    environ: Mapping[str, str]
    tiers: Mapping[str, str]
    _aliases: tuple[str, ...]
    _routes: Routes
    _sources: tuple[_Source, ...]

    @classmethod
    def load(
        cls, start: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = _ENVIRON, **settings: Any
    ) -> Self:
        """Read the file (from folder ``start`` upwards; by default the current one), the variables, the arguments.

        Raises:
            ConfigError: on the first wrong key or value, with its file and line, the nearest right key, or the range.
        """
        environ = Environment.over(environ)
        sources: list[_Source] = []
        if (found := _found_file(Path.cwd() if start is None else Path(start))) is not None:
            sources.append(_File(*found))
        sources.append(_Variables(environ))
        return cls._made((*sources, _Arguments(settings)), environ)

    @classmethod
    def of(cls, environ: Mapping[str, str] = _ENVIRON, **settings: Any) -> Self:
        """Settings from arguments alone; neither a file nor an ``LLMKIT_*`` variable is read.

        Raises:
            ConfigError: see `load`.
        """
        environ = Environment.over(environ)
        return cls._made((_Arguments(settings),), environ)

    def with_(self, **settings: Any) -> Self:
        """A copy with these settings over the present ones.

        Raises:
            ConfigError: see `load`.
        """
        return self._made((*self._sources, _Arguments(settings)), self.environ)

    @classmethod
    def _made(cls, sources: tuple[_Source, ...], environ: Mapping[str, str]) -> Self:
        tree: dict[str, Any] = {}
        for source in sources:
            tree = _merged(tree, source.tree)
        blame = _Blame(sources)
        providers = _providers(tree.get("providers", {}), blame)
        models = tree.get("models", {})
        routes = Routes(models, providers, environ, blame)
        for name in models:
            routes.check(name, ("models", name))
        if "model" in tree:
            routes.check(tree["model"], ("model",))
        for tier, names in tree.get("tiers", {}).items():
            routes.check(names, ("tiers", tier))
        for name in tree.get("budget", {}).get("model", {}):
            if name != "*":
                routes.check_endpoint(name, ("budget", "model", name))
        return cls(
            model=tree.get("model"),
            offline=tree.get("offline", False),
            budget=_budget(tree.get("budget", {}), blame),
            timeouts=_timeouts(tree.get("timeout", {})),
            retry=_retry(tree.get("retry", {}), blame),
            breaker=BreakerSettings(**tree.get("breaker", {})),
            cache=_cache(tree.get("cache", {})),
            alerts=AlertSettings(**tree.get("alerts", {})),
            notebook=NotebookSettings(**tree.get("notebook", {})),
            degraded_text=tree.get("degraded", {}).get("text"),
            state_url=tree.get("state", {}).get("url", "sqlite"),
            state_on_failure=tree.get("state", {}).get("on_failure", "refuse"),
            providers=providers,
            file=next((source.file for source in sources if source.file), None),
            notices=(*_without_effect(tree), *(note for source in sources for note in source.notes)),
            environ=environ,
            tiers=MappingProxyType(tree.get("tiers", {})),
            _aliases=tuple(models),
            _routes=routes,
            _sources=sources,
        )

    def route(self, model: str) -> tuple[Link, ...]:
        """The links that a call for ``model`` may take, in order: a name, an alias, or several with commas between.

        Raises:
            ConfigError: where it leads nowhere, naming the nearest that does.
        """
        return self._routes.links(model)

    def tier(self, name: str) -> str:
        """The model that is set for work of this kind.

        Raises:
            ConfigError: none is, with the two lines that would set it.
        """
        model = self.tiers.get(name)
        if model is None:
            known = f"; [tiers] sets {', '.join(self.tiers)}" if self.tiers else ""
            file = FILE if self.file is None else self.file.name
            table = "tool.llmkit.tiers" if file == PROJECT else "tiers"
            lines = (
                f'these lines in {file} set it, once llmkit is loaded again:\n  [{table}]\n  {name} = "provider:model"'
            )
            raise ConfigError(f"the tier {name} is not set{known}", next_step=lines)
        return model

    def aliases(self) -> dict[str, tuple[Link, ...]]:
        """Every alias of ``[models]`` with its links."""
        return {name: self.route(name) for name in self._aliases}

    def default_model(self) -> Default:
        """The model of a call that names none: the setting, else a key, else a local server, else the simulator.

        Looks at the environment, and perhaps at local ports (at most 0.35 s), each time; keep what it says.
        """
        source = next((s for s in reversed(self._sources) if "model" in s.tree), None)
        if self.offline:
            if self.model is not None and source is not None and self._stays_here(self.model):
                return Default(self.model, source.label)
            return Default("simulator", "offline: no call leaves this machine")
        if self.model is not None and source is not None:
            return Default(self.model, source.label)
        found = find(self.providers, self.environ)
        if found.model == "simulator" and self.file is not None:
            return Default("simulator", f"{self.file.name} names no model; no key or local server found")
        return found

    def _stays_here(self, model: str) -> bool:
        return all(link.endpoint.simulated or is_loopback(link.endpoint.base_url) for link in self.route(model))

    def __repr__(self) -> str:
        from llmkit.settings import shown

        file = None if self.file is None else self.file.name
        return f"<Config model={shown(self.model)} file={shown(file)} aliases={list(self._aliases)} offline={self.offline}>"


# -- where settings come from ------------------------------------------------------------------------------------------


class _Source:
    """One place that settings come from: ``tree`` as checked, and how to say where in it something stands."""

    # What may be set is only loaded where something is: most sessions start with nothing but a key.
    tree: Mapping[str, Any] = MappingProxyType({})
    file: Path | None = None
    notes: tuple[str, ...] = ()
    label = "as set here"

    def _check(self, tree: Any) -> None:
        from llmkit.settings import SETTINGS, check

        self.tree = check(tree, SETTINGS, (), self.error)

    def error(self, message: str, path: Place, next_step: str | None = None) -> ConfigError:
        raise NotImplementedError

    def depth(self, path: Place) -> int:
        """How much of ``path`` stands in this source."""
        node: Any = self.tree
        for depth, name in enumerate(path):
            in_table = isinstance(node, dict) and name in node
            if not in_table and not (isinstance(node, tuple) and isinstance(name, int) and name < len(node)):
                return depth
            node = node[name]
        return len(path)


class _File(_Source):
    """A TOML file, or a table within one."""

    def __init__(self, file: Path, text: str, prefix: tuple[str, ...], tree: Any) -> None:
        self.file = file
        self.label = f"from {file.name}"
        self._text = text
        self._prefix = prefix
        from llmkit.settings import key_inside

        if (secret := key_inside(tree)) is not None:
            raise self.error(
                "this looks like a key or a password, and those never stand in a file",
                secret,
                'put it into an environment variable, and the variable\'s name here: api_key_env = "NAME"',
            )
        self._check(tree)

    def error(self, message: str, path: Place, next_step: str | None = None) -> ConfigError:
        from llmkit.places import line_of

        line = line_of(self._text, (*self._prefix, *path))
        return ConfigError(message, file=self.file, line=line, next_step=next_step)


class _Variables(_Source):
    """The ``LLMKIT_*`` variables."""

    label = "from LLMKIT_MODEL"

    def __init__(self, environ: Mapping[str, str]) -> None:
        # What ends like a key is likely one that some api_key_env names, and not looked at.
        given = {
            name: environ[name]
            for name in environ
            if name.startswith(PREFIX) and name not in _OTHER_VARIABLES and not name.endswith(("_KEY", "_TOKEN"))
        }
        if given:
            self._read(given)

    def _read(self, given: Mapping[str, str]) -> None:
        from llmkit.settings import flat_names

        flat = flat_names()
        tree: dict[str, Any] = {}
        for name, text in given.items():
            setting = flat.get(name.removeprefix(PREFIX).lower())
            if setting is None:
                self._unknown(name, flat)
            elif text.strip():
                _put(tree, setting[0], setting[1].parse(text))
        self._check(tree)

    def _unknown(self, name: str, flat: Mapping[str, Any]) -> None:
        from llmkit.settings import nearest, shown

        if (near := nearest(name.removeprefix(PREFIX).lower(), flat, 0.75)) is not None:
            raise ConfigError(f"there is no setting {shown(name)[1:-1]}; did you mean {PREFIX}{near.upper()}?")
        self.notes = (*self.notes, f"{shown(name)[1:-1]} is set, but it is no setting of llmkit")

    def error(self, message: str, path: Place, next_step: str | None = None) -> ConfigError:
        name = PREFIX + "_".join(str(part) for part in path).upper()
        return ConfigError(f"{name}: {message}", next_step=next_step)


class _Arguments(_Source):
    """Keyword arguments, and ``%config``."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        given = {name: value for name, value in settings.items() if value is not None}
        if given:
            self._read(given)

    def _read(self, given: Mapping[str, Any]) -> None:
        from llmkit.settings import SETTINGS, flat_names

        flat = flat_names()
        tree: dict[str, Any] = {}
        for name, value in given.items():
            if name in SETTINGS:
                table = _short(value) if name == "timeout" else value
                tree[name] = _merged(tree.get(name, {}), table, (name,)) if isinstance(table, dict) else table
            elif name in flat:
                _put(tree, flat[name][0], value)
            else:
                raise _no_argument(name, flat)
        self._check(tree)

    def error(self, message: str, path: Place, next_step: str | None = None) -> ConfigError:  # noqa: ARG002  the message names it
        return ConfigError(message, next_step=next_step)


def _no_argument(name: str, flat: Mapping[str, Any]) -> ConfigError:
    from llmkit.settings import SETTINGS, nearest, shown

    near = nearest(name, [*SETTINGS, *flat])
    return ConfigError(f"there is no setting {shown(name)}" + (f"; did you mean {near}?" if near else ""))


def _short(value: Any) -> Any:
    """``timeout=60`` and ``timeout="chat"``, written out."""
    if isinstance(value, str) and value != "off":
        return {"preset": value}
    return dict(value) if hasattr(value, "keys") else {"total": value}


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *tables, key = path
    for name in tables:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):  # an argument gave something else for this table; `check` says so
            return
        tree = inner
    tree[key] = value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """``above`` over ``below``: tables key by key, but one model or provider, and a preset, as a whole."""
    merged = {} if path == ("timeout",) and "preset" in above else dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, dict) and isinstance(under, dict) and path not in {("models",), ("providers",)}:
            merged[name] = _merged(under, value, (*path, name))
        else:
            merged[name] = value
    return merged


class _Blame:
    """Makes an error about the merged settings one about the source that said it."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = sources

    def __call__(self, message: str, path: Place, next_step: str | None = None) -> ConfigError:
        depth, source = max(((s.depth(path), i) for i, s in enumerate(self._sources)), default=(0, 0))
        if depth == 0:
            return ConfigError(message, next_step=next_step)
        return self._sources[source].error(message, path, next_step)


# -- the file ----------------------------------------------------------------------------------------------------------


def _found_file(start: Path) -> tuple[Path, str, tuple[str, ...], Any] | None:
    """The nearest file from ``start`` upwards: its path, its text, the table in it, that table's content."""
    start = start.absolute()
    home = None
    with suppress(RuntimeError):  # a process without a home
        home = Path.home()
    for folder in (start, *start.parents):
        file = folder / FILE
        if _exists(file):
            text = _read(file)
            return file, text, (), _parsed(file, text)
        file = folder / PROJECT
        if _exists(file) and (found := _in_project(file)) is not None:
            return found
        if folder == home:
            return None
    return None


def _exists(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a folder above that may not be looked into
        return False


def _in_project(file: Path) -> tuple[Path, str, tuple[str, ...], Any] | None:
    text = _read(file)
    if not re.search(r"\btool\s*\.\s*[\"']?llmkit\b|^\s*\[\s*tool\s*\]", text, re.MULTILINE):
        return None  # somebody else's file: not even a mistake in it is our business
    tool = _parsed(file, text).get("tool")
    if not isinstance(tool, dict) or "llmkit" not in tool:
        return None
    return file, text, ("tool", "llmkit"), tool["llmkit"]


def _read(file: Path) -> str:
    try:
        with file.open("rb") as source:
            content = source.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"longer than {MAX_FILE_BYTES} bytes", file=file)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8 text", file=file, line=line) from None


def _parsed(file: Path, text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        from llmkit.settings import shown

        message, _, place = str(error).partition(" (at ")
        number = re.search(r"line (\d+)", place)
        line = int(number[1]) if number else text.rstrip().count("\n") + 1 if place else None
        raise ConfigError(f"not TOML: {shown(message)[1:-1]}", file=file, line=line) from None
    except (ValueError, ArithmeticError, RecursionError):
        raise ConfigError("not TOML that can be used: a number too large, or nested too deeply", file=file) from None


# -- what the settings say ---------------------------------------------------------------------------------------------


def _providers(tables: Mapping[str, Mapping[str, Any]], blame: _Blame) -> Mapping[str, ProviderEntry]:
    if not tables:
        return CATALOG
    own = {name: _provider(name, table, blame) for name, table in tables.items()}
    new = {name: entry for name, entry in own.items() if name not in CATALOG}
    return {**new, **CATALOG, **own}


def _provider(name: str, table: Mapping[str, Any], blame: _Blame) -> ProviderEntry:
    path = ("providers", name)
    known = CATALOG.get(name)
    if known is None and "base_url" not in table:
        from llmkit.settings import nearest

        near = nearest(name, CATALOG)
        raise blame(f"providers.{name} needs base_url" + (f"; or did you mean {near}?" if near else ""), path)
    if known is not None and known.simulated:
        raise blame("the simulator has no settings", path)
    entry = known or ProviderEntry(name=name, base_url=table["base_url"])
    if "base_url" in table and "api_key_env" not in table:
        try:
            entry = moved(entry, table["base_url"])
        except ValueError as error:
            raise blame(
                f"{error} and is not sent to another host unasked",
                (*path, "base_url"),
                'say which key goes there: api_key_env = "NAME", or "off" for none',
            ) from None
    elif "base_url" in table:
        entry = replace(entry, base_url_env=None)
    entry = replace(entry, **table)
    if "api_key_env" in table:
        entry = replace(entry, key_required=entry.api_key_env is not None and not entry.local)
    return entry


def _budget(table: Mapping[str, Any], blame: _Blame) -> BudgetSettings:
    request = table.get("request", {})
    caps = {f"request_{unit}": value for unit, value in request.items()}
    other = {name: table[name] for name in ("at_limit", "warn_at", "timezone") if name in table}
    limits: list[Limit] = []
    for window in WINDOWS:
        default = _DEFAULT_LIMITS.get(window)
        given = table.get(window, {})
        usd = given.get("usd", default)
        if usd is not None or given.get("tokens") is not None:
            is_default = default is not None and "usd" not in given
            limits.append(Limit(window, usd, given.get("tokens"), is_default=is_default))
    for kind in ("user", "tag", "model"):
        for name, windows in table.get(kind, {}).items():
            if kind == "tag" and not re.fullmatch(r"[^=]+=.+", name):
                raise blame(f"budget.tag.{name}: a tag is key=value, or key=* for each value", ("budget", kind, name))
            limits += [Limit(w, each.get("usd"), each.get("tokens"), kind, name) for w, each in windows.items()]
    starred = {_whose(limit) for limit in limits if limit.name == "*" or limit.name.endswith("=*")}
    kept = tuple(
        limit
        for limit in limits
        # One's own "off" lifts what holds for everybody.
        if limit.usd is not None or limit.tokens is not None or _whose(limit) in starred
    )
    return BudgetSettings(**caps, request_usd_set="usd" in request, limits=kept, **other)


def _whose(limit: Limit) -> tuple[str, str, str]:
    """What a limit of one has in common with that of everybody (``*``)."""
    return (limit.kind, limit.name.partition("=")[0] if limit.kind == "tag" else "", limit.window)


def _cache(table: Mapping[str, Any]) -> CacheSettings:
    return CacheSettings(**{("ttl_s" if name == "ttl" else name): value for name, value in table.items()})


def _timeouts(table: Mapping[str, Any]) -> Timeouts:
    limits = {name: value for name, value in table.items() if name != "preset"}
    base = PRESETS[table["preset"]] if "preset" in table else Timeouts()
    return replace(base, **limits, first_token_set=limits.get("first_token") is not None) if limits else base


def _retry(table: Mapping[str, Any], blame: _Blame) -> RetrySettings:
    retry = RetrySettings(**table)
    if retry.initial > retry.maximum:
        name = "initial" if "initial" in table else "maximum"
        message = f"retry.initial ({retry.initial:g}) must not be above retry.maximum ({retry.maximum:g})"
        raise blame(message, ("retry", name))
    return retry


def _without_effect(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each setting that is read and does nothing yet. A cap that nobody keeps must not look like one."""
    notices = []
    notices += [
        f"[{table}] has no effect in this version" for table in ("rate_limit", "guardrails", "slo") if tree.get(table)
    ]
    if names := [name for name, model in tree.get("models", {}).items() if "max_concurrency" in model]:
        notices.append(f"[models] {', '.join(names)}: max_concurrency has no effect in this version")
    return tuple(notices)
