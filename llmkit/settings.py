"""What can be set, and to what: every table, key, type and range, as data.

`SETTINGS` is the one place that says so; files, ``LLMKIT_*`` variables and arguments are all checked against it, and
the documentation is tested against it. A limit is lifted by ``"off"``, in a file, a variable and an argument alike.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from llmkit.call import TIERS
from llmkit.providers.catalog import QUIRKS, base_url_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from llmkit.errors import ConfigError

    Fail = Callable[..., ConfigError]
    Place = tuple[str | int, ...]

__all__ = ["OFF", "SETTINGS", "Rule", "check", "flat_names", "key_inside", "nearest", "shown"]

OFF = "off"
ANY_NAME = "*"
ANY_TEXT = "**"
REQUIRED = "!"
_PLACEHOLDERS = frozenset({ANY_NAME, ANY_TEXT, REQUIRED})

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_UNITS_B = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_FLAGS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_LONGEST_TEXT = 200
_ON = frozenset({"context_too_long", "refused"})

# Narrower than what redaction hides: a model may well be called hf-internal-testing/tiny.
_KEY = (
    r"(?i)\b(?:sk|gsk|xai|hf|pplx|nvapi|csk|tgp|fw|r8|glpat|gh[opsu]|github_pat)[-_](?=[\w-]*\d)[\w-]{14,}"
    r"|\bAIza[\w-]{20,}|\bAKIA[A-Z0-9]{12,}|\beyJ[\w-]{8,}\.[\w-]{8,}|\bbearer\s+\S{8,}|://[^/@\s]+@"
)
_KEY_NAME = r"(?i)key|secret|password|authorization|token|.*[_-](?:key|token|secret)|(?:api|auth|access).*"


class Rule:
    """What one setting may be. ``str(rule)`` says it in words."""

    __slots__ = ("choices", "high", "kind", "low", "off", "words")

    def __init__(
        self,
        kind: str,
        low: str = "0",
        high: str = "0",
        *,
        off: bool = False,
        words: str = "",
        choices: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.low = Decimal(low)
        self.high = Decimal(high)
        self.off = off
        self.words = words
        self.choices = choices

    def __str__(self) -> str:
        if self.choices:
            names = " or ".join(f'"{choice}"' for choice in self.choices)
            return f"a list of {names}" if self.kind == "names" else names
        if self.kind in {"integer", "number", "usd"}:
            what = {"integer": "a whole number", "usd": "an amount of USD"}.get(self.kind, "a number")
            lifted = f', or "{OFF}" for no limit' if self.off else ""
            return f"{what}{self.words} from {self.low:f} to {self.high:f}{lifted}"
        return self.words

    def read(self, value: Any) -> Any:
        """The value in its one form; None where it is ``"off"``.

        Raises:
            ValueError: it is not what this rule allows; a text in the error says so better than ``str(rule)``.
        """
        if self.off and value == OFF:
            return None
        return _READERS[self.kind](self, value)

    def parse(self, text: str) -> Any:
        """A variable's text as the value a file would hold; text that is none is left for `read` to refuse."""
        if self.kind in {"integer", "number", "usd"}:
            try:
                number = Decimal(text.strip())
            except InvalidOperation:
                return text
            return int(number) if self.kind == "integer" and number == number.to_integral_value() else number
        if self.kind == "flag":
            return _FLAGS.get(text.strip().lower(), text)
        return text.strip()


def _amount(rule: Rule, value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError
    # A float's shortest text is what the user wrote; its binary value is not.
    amount = Decimal(repr(float(value))) if isinstance(value, float) else Decimal(value)
    if not amount.is_finite() or not rule.low <= amount <= rule.high:
        raise ValueError
    return amount


def _integer(rule: Rule, value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError
    return int(_amount(rule, value))


def _flag(_: Rule, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(rule: Rule, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    if rule.choices and value not in rule.choices:
        raise ValueError
    if len(value) > (rule.high or 200):
        raise ValueError(f"at most {rule.high or 200} characters long")
    return value


def _names(rule: Rule, value: Any) -> frozenset[str]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError
    if not all(isinstance(name, str) and name in rule.choices for name in value):
        raise ValueError
    return frozenset(value)


def _url(_: Rule, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return base_url_from(value)


def _variable(_: Rule, value: Any) -> str:
    # What is long and mixes small letters with digits is a key pasted here by mistake.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", value):
        raise ValueError
    if re.search(_KEY, value) or (len(value) >= 20 and re.search(r"[a-z]", value) and re.search(r"\d", value)):
        raise ValueError
    return value


def _store(rule: Rule, value: Any) -> str:
    text = _text(rule, value)
    if text not in {"sqlite", "memory"} and not re.match(r"(?:sqlite:///|rediss?://).", text):
        raise ValueError
    return text


def _zone(rule: Rule, value: Any) -> str:
    from zoneinfo import ZoneInfo

    text = _text(rule, value)
    try:
        return ZoneInfo(text).key
    except (KeyError, OSError, ValueError):  # not found; or no name of one, such as a path
        raise ValueError from None


def _namespace(rule: Rule, value: Any) -> str:
    text = _text(rule, value)
    if text not in {"shared", "user"} and not re.match("tag:.", text):
        raise ValueError
    return text


def _scaled(units: Mapping[str, int]) -> Callable[[Rule, Any], int]:
    def read(_: Rule, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**15:
            return value
        match = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", value) if isinstance(value, str) else None
        unit = units.get(match[2] if match and match[2] in units else match[2].upper()) if match else None
        if match is None or unit is None or int(match[1]) == 0:
            raise ValueError
        return int(match[1]) * unit

    return read


_READERS: dict[str, Callable[[Rule, Any], Any]] = {
    "integer": _integer,
    "number": lambda rule, value: float(_amount(rule, value)),
    "usd": _amount,
    "flag": _flag,
    "text": _text,
    "names": _names,
    "url": _url,
    "variable": _variable,
    "store": _store,
    "zone": _zone,
    "namespace": _namespace,
    "duration": _scaled(_UNITS_S),
    "size": _scaled(_UNITS_B),
    "any": lambda _, value: value,
}

_SECONDS = Rule("number", "0.001", "86400", words=" of seconds")
_LIMIT_S = Rule("number", "0.001", "86400", words=" of seconds", off=True)
_WAIT_S = Rule("number", "0", "3600", words=" of seconds")
_USD = Rule("usd", "0.000001", "1000000", off=True)
_TOKENS = Rule("integer", "1", "1000000000000", off=True)
_WINDOW = Rule("integer", "1", "100000000")
_COUNT = Rule("integer", "1", "1000")
_RATE = Rule("number", "0.001", "1")
_PRICE = Rule("usd", "0", "100000")
_FLAG = Rule("flag", words="true or false")
_MODEL = Rule("text", words='"provider:model", an alias, or several of them with commas between', high="500")
_TEXT = Rule("text", words="text")
_URL = Rule("url", words="a URL such as http://127.0.0.1:8000/v1")
_VARIABLE = Rule(
    "variable", words=f'the name of an environment variable (never a key itself), or "{OFF}" for no key', off=True
)
_ANY = Rule("any")
_CAP = {"usd": _USD, "tokens": _TOKENS}
_WINDOWED = dict.fromkeys(("session", "hour", "day", "week", "month", "total"), _CAP)
_ALERT = Rule("usd", "0.000001", "1000000", off=True)
_OPEN_TABLE = {ANY_NAME: _ANY}

_LIMITS: dict[str, Any] = {
    "max_cost_usd": Rule("usd", "0.000001", "1000000"),
    "max_latency_s": _SECONDS,
    "disabled": _FLAG,
    "on": Rule("names", choices=tuple(sorted(_ON))),
}

CHAIN = Rule("chain", words='a list of models: "provider:model", an alias, or { model = …, max_cost_usd = … }')
_CHAIN_ENTRY: dict[str, Any] = {REQUIRED: ("model",), "model": _MODEL, **_LIMITS}

SETTINGS: dict[str, Any] = {
    "model": _MODEL,
    "offline": _FLAG,
    "models": {
        ANY_NAME: {
            "chain": CHAIN,
            "provider": _TEXT,
            "model": _MODEL,
            "base_url": _URL,
            "api_key_env": _VARIABLE,
            "price": {
                REQUIRED: ("input", "output"),
                "input": _PRICE,
                "output": _PRICE,
                "cached_input": _PRICE,
                "cache_write": _PRICE,
            },
            "window": _WINDOW,
            "max_output": _WINDOW,
            "max_concurrency": Rule("integer", "1", "100000"),
            **_LIMITS,
        }
    },
    "providers": {
        ANY_NAME: {
            "base_url": _URL,
            "wire": Rule("text", choices=("openai", "anthropic")),
            "api_key_env": _VARIABLE,
            "local": _FLAG,
            "quirks": Rule("names", choices=tuple(sorted(QUIRKS))),
        }
    },
    "tiers": dict.fromkeys(TIERS, _MODEL),
    "budget": {
        "request": _CAP,
        **_WINDOWED,
        "user": {ANY_TEXT: _WINDOWED},
        "tag": {ANY_TEXT: _WINDOWED},
        "model": {ANY_TEXT: _WINDOWED},
        "at_limit": Rule("text", choices=("error", "downgrade", "warn")),
        "warn_at": Rule("number", "0.01", "1", words=" (a share of the limit)"),
        "timezone": Rule("zone", words='the name of a time zone, such as "UTC" or "Europe/Berlin"'),
    },
    "timeout": {
        "preset": Rule("text", choices=("chat", "code")),
        "connect": _LIMIT_S,
        "first_token": _LIMIT_S,
        "idle": _LIMIT_S,
        "total": _LIMIT_S,
    },
    "retry": {"attempts": Rule("integer", "1", "20"), "initial": _WAIT_S, "maximum": _WAIT_S},
    "breaker": {
        "failures": _COUNT,
        "rate": _RATE,
        "window_s": _SECONDS,
        "minimum_calls": _COUNT,
        "open_s": _SECONDS,
        "probes": _COUNT,
        "successes": _COUNT,
    },
    "cache": {
        "enabled": _FLAG,
        "ttl": Rule("duration", off=True, words='a time such as "7d", "12h" or "90s", or "off" for no end'),
        "max_bytes": Rule("size", words='a size such as "1GB" or "500MB"'),
        "memory_bytes": Rule("size", words='a size such as "64MB"'),
        "namespace": Rule("namespace", words='"shared", "user" or "tag:NAME"'),
        "persist": _FLAG,
    },
    "alerts": {
        "call_usd": _ALERT,
        "hour_usd": _ALERT,
        "day_usd": _ALERT,
        "jump": Rule("number", "1.5", "1000", off=True, words=" (times the usual hour)"),
    },
    "degraded": {"text": Rule("text", words="text", high="10000")},
    "notebook": {
        "keep": _FLAG,
        "format": Rule("text", choices=("markdown", "text", "json", "code", "html")),
        "display": Rule("text", choices=("live", "final")),
        "traceback": _FLAG,
        "system": Rule("text", words="text", high="10000"),
        "temperature": Rule("number", "0", "2"),
        "max_tokens": _WINDOW,
        "user": _TEXT,
    },
    "rate_limit": _OPEN_TABLE,
    "guardrails": _OPEN_TABLE,
    "slo": {
        ANY_NAME: {
            "p95_s": _SECONDS,
            "error_rate": Rule("number", "0", "1"),
            "mean_cost_usd": Rule("usd", "0", "1000000"),
        }
    },
    "state": {
        "url": Rule("store", words='"sqlite", "sqlite:///FILE", "memory" or "redis://HOST:PORT/NUMBER"'),
        "on_failure": Rule("text", choices=("refuse", "continue")),
    },
}
"""Every setting: a table is a dict, ``*`` and ``**`` stand for any name or text, a `Rule` is what one key may be."""


def flat_names() -> dict[str, tuple[tuple[str, ...], Rule]]:
    """Every single setting by its one-word name (``timeout_total``): its path and its rule. For variables and arguments."""
    found: dict[str, tuple[tuple[str, ...], Rule]] = {}

    def walk(table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, rule in table.items():
            if name in _PLACEHOLDERS:
                continue
            if isinstance(rule, Rule):
                found["_".join((*path, name))] = ((*path, name), rule)
            else:
                walk(rule, (*path, name))

    walk(SETTINGS, ())
    return found


def check(value: Any, rule: Any, path: Place, fail: Fail) -> Any:
    """``value`` in its one form, as ``rule`` (a part of `SETTINGS`) allows it.

    Raises:
        ConfigError: what ``fail(message, path, next_step)`` makes of the first thing that is wrong.
    """
    if isinstance(rule, dict):
        return _table(value, rule, path, fail)
    if rule is CHAIN:
        return _chain(value, path, fail)
    try:
        return rule.read(value)
    except ValueError as error:
        hidden = rule.kind in {"variable", "url", "store"}
        got = "" if hidden else f", not {shown(value)}"
        raise fail(f"{_dotted(path)} must be {error.args[0] if error.args else rule}{got}", path) from None


def _table(value: Any, rules: Mapping[str, Any], path: Place, fail: Fail) -> dict[str, Any]:
    if not isinstance(value, dict):
        keys = ", ".join(name for name in rules if name not in _PLACEHOLDERS)
        raise fail(f"{_dotted(path)} must be a table{f' of {keys}' if keys else ''}, not {shown(value)}", path)
    checked = {}
    for name, item in value.items():
        rule = rules.get(name) if name != REQUIRED else None
        if rule is None and ANY_TEXT in rules:
            _check_text(name, path, fail)
            rule = rules[ANY_TEXT]
        if rule is None and ANY_NAME in rules:
            _check_name(name, path, fail)
            rule = rules[ANY_NAME]
        if rule is None:
            raise _unknown(name, rules, path, fail)
        checked[name] = check(item, rule, (*path, name), fail)
    for name in rules.get(REQUIRED, ()):
        if name not in checked:
            raise fail(f"{_dotted(path)} needs {name}", path)
    return checked


def _check_name(name: object, path: Place, fail: Fail) -> None:
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        words = "letters, digits, dot, dash and underscore"
        raise fail(
            f"{_dotted(path)}: a name there is made of {words} (at most 64), not {shown(name)}", (*path, str(name))
        )


def _check_text(name: object, path: Place, fail: Fail) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST_TEXT:
        words = f"1 to {_LONGEST_TEXT} printable characters"
        raise fail(f"{_dotted(path)}: a name there is {words}, not {shown(name)}", (*path, str(name)))


def _unknown(name: str, rules: Mapping[str, Any], path: Place, fail: Fail) -> ConfigError:
    where = f"[{_dotted(path)}]" if path else "the settings"
    names = [key for key in rules if key not in _PLACEHOLDERS]
    here = (*path, name)
    if not nearest(name, names) and re.fullmatch(_KEY_NAME, str(name)):
        step = 'put the key into an environment variable, and the variable\'s name here: api_key_env = "NAME"'
        return fail(f"{where} has no {shown(name)}: keys never stand in settings", here, step)
    near = nearest(name, names)
    hint = f"; did you mean {near}?" if near else f"; there are {', '.join(names)}"
    return fail(f"{where} has no {shown(name)}{hint}", here, f"keys of {where}: {', '.join(names)}")


def _chain(value: Any, path: Place, fail: Fail) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 20:
        raise fail(f"{_dotted(path)} must be {CHAIN.words}, 1 to 20 of them", path)
    links = []
    for index, entry in enumerate(value):
        here = (*path, index)
        links.append(check({"model": entry} if isinstance(entry, str) else entry, _CHAIN_ENTRY, here, fail))
    return tuple(links)


def key_inside(value: Any, path: Place = ()) -> Place | None:
    """The path to the first text, name or value, that looks like a key or a password; None where there is none."""
    if isinstance(value, str):
        return path if re.search(_KEY, value) else None
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, item in items:
        if isinstance(name, str) and re.search(_KEY, name):
            return (*path, name)
        if (found := key_inside(item, (*path, name))) is not None:
            return found
    return None


def nearest(name: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that was probably meant; ``cutoff`` (0 to 1) is how alike it must be."""
    from difflib import get_close_matches

    near = get_close_matches(str(name)[:200], list(names), 1, cutoff)
    return near[0] if near else None


def shown(value: object) -> str:
    """A value as an error may show it: short, on one line, no key in it."""
    from llmkit.redaction import redact

    if isinstance(value, dict | list | tuple | set | frozenset):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "a very large number"
    if re.search(_KEY, text):
        return "(hidden: it looks like a key)"
    return redact(text if len(text) <= 80 else f"{text[:79]}…")


def _dotted(path: Place) -> str:
    if not path:
        return "the settings"
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_named(part)}" for part in path).removeprefix(".")


def _named(name: str) -> str:
    """A name as it is where that is harmless; a quoted one can hold anything, so it is shown as carefully as a value."""
    return name if re.fullmatch(_NAME, name) and not re.search(_KEY, name) else shown(name)
