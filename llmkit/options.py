"""What can be said with one call, checked before anything is sent."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from llmkit.call import CACHE_MODES, TIERS, Params, Timeouts, messages_from
from llmkit.config import PRESETS
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmkit.call import Message
    from llmkit.events import Event

__all__ = ["CACHE_MODES", "Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What can be said with one call. None leaves it to the settings, or to the provider.

    Attributes:
        model: ``provider:model``, an alias, or several with commas between (a chain).
        tier: ``simple``, ``medium`` or ``hard``: the model that ``[tiers]`` sets for such work, instead of ``model``.
        system: the system prompt.
        images: pictures that go with the prompt: paths, URLs, bytes, objects that show themselves (`llmkit.images.Picture.of`).
        temperature: 0 to 2. top_p: above 0, up to 1.
        max_tokens: most output tokens, reasoning included; from 1.
        stop: a text, or several, at which the answer ends.
        max_cost: USD this call may cost, all attempts together.
        timeout: seconds in all; ``"chat"`` or ``"code"``; or a `llmkit.call.Timeouts`.
        user, tags: whom and what the cost is booked for.
        extra: further fields of the request body, passed on as they are.
        schema: the shape that the answer must have: a Pydantic class, a JSON schema, or fields in short such as
            ``"name, age int, tags list"``; see `llmkit.schema.Schema.of`. ``reply.data`` is what it says.
        cache: ``"use"`` (default), ``"refresh"`` (ask anew, and store), ``"off"``, ``"only"`` (never ask).
        repeat: 0 and up: which sample of the answer; each number has an answer of its own in the cache.
        template: the text that the prompt was made from, the same for a whole loop: the ledger keeps a digest of it, and
            a plan expects of its next prompt what the last ones came to.
        request_id: a unique id of your own, instead of a generated one.
        on_event: hears what happens to this call (`llmkit.events`), on the event loop's thread.
    """

    model: str | None = None
    tier: str | None = None
    system: str | None = None
    images: Sequence[Any] | None = field(default=None, repr=False)
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    max_cost: Decimal | float | str | None = None
    timeout: float | str | Timeouts | None = None
    user: str | None = None
    tags: Mapping[str, str] | None = None
    extra: Mapping[str, Any] | None = None
    schema: Any = None
    cache: str | None = None
    repeat: int | None = None
    template: str | None = None
    request_id: str | None = None
    on_event: Callable[[Event], object] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Check what the user passed.

        Raises:
            ConfigError: on an unknown name or an impossible value, naming the nearest name or the allowed range.
        """
        if not given:
            return _NONE
        for name in given:
            if name not in _NAMES:
                near = difflib.get_close_matches(name, _NAMES, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_NAMES)}"
                raise ConfigError(f"there is no option {name}{hint}")
        if given.get("schema") is not None:
            from llmkit.schema import Schema

            given = {**given, "schema": Schema.of(given["schema"])}
        if given.get("images") is not None:
            from llmkit.images import Picture

            given = {**given, "images": Picture.all_of(given["images"])}
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        _text("model", self.model)
        self._check_tier()
        self._check_schema()
        _text("system", self.system)
        _text("user", self.user)
        _text("request_id", self.request_id)
        _text("template", self.template)
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("seed", self.seed, None)
        _whole("repeat", self.repeat, 0)
        if self.cache is not None and self.cache not in CACHE_MODES:
            raise ConfigError(f"cache is one of {', '.join(CACHE_MODES)}, not {self.cache!r:.60}")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ConfigError("stop is a text, or a list of texts, none of them empty")
        for name in ("tags", "extra"):
            if not isinstance(getattr(self, name) or {}, Mapping):
                raise ConfigError(f"{name} is a dict, not a {type(getattr(self, name)).__name__}")
        if any(not isinstance(part, str) for tag in (self.tags or {}).items() for part in tag):
            raise ConfigError("tags maps text to text")
        if self.on_event is not None and not callable(self.on_event):
            raise ConfigError("on_event is something that can be called with an event")
        _ = self.max_cost_usd  # reading it checks it
        self.timeouts(Timeouts())

    def _check_schema(self) -> None:
        if self.schema is None or not isinstance(self.extra, Mapping):
            return
        config = self.extra.get("output_config")  # of which an effort is no shape
        named = [name for name in _SHAPING if name in self.extra]
        if named or (isinstance(config, Mapping) and "format" in config):
            said = named[0] if named else "output_config.format"
            raise ConfigError(f"schema says the shape of the answer, and extra's {said} another: give one of them")

    def _check_tier(self) -> None:
        if self.tier is None:
            return
        if self.tier not in TIERS:
            raise ConfigError(f"tier is one of {', '.join(TIERS)}, not {self.tier!r:.60}")
        if self.model is not None:
            message = f"a call has a model or a tier, not both: {self.model!r:.60} and {self.tier!r}"
            raise ConfigError(message, next_step="leave one of them out; [tiers] says which model a tier is")

    def unheard(self) -> Options:
        """The same, of which nobody hears anything."""
        return self if self.on_event is None else replace(self, on_event=None)

    @property
    def are_given(self) -> bool:
        """Whether anything was said at all."""
        return self is not _NONE

    @property
    def max_cost_usd(self) -> Decimal | None:
        if self.max_cost is None:
            return None
        try:
            # A float's shortest text is what the user wrote; its binary value is not.
            cost = Decimal(str(self.max_cost))
        except InvalidOperation:
            cost = Decimal(-1)
        if isinstance(self.max_cost, bool) or not cost.is_finite() or cost <= 0:
            raise ConfigError(f"max_cost is an amount of USD above 0, not {self.max_cost!r}")
        return cost

    def messages(self, prompt: Any) -> tuple[Message, ...]:
        """``prompt``, as `llmkit.call.messages_from` takes it, with the system prompt and the pictures.

        Raises:
            ConfigError: there is no message that the pictures could go with.
            TypeError, ValueError: it is no prompt.
        """
        messages = messages_from(prompt, self.system)
        if not self.images:
            return messages
        from llmkit.images import illustrated

        return illustrated(messages, self.images)

    def params(self) -> Params:
        """What shapes the answer."""
        if self is _NONE:
            return _DEFAULT
        return Params(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop=() if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            extra=dict(self.extra or {}),
        )

    def timeouts(self, settings: Timeouts) -> Timeouts:
        """The time limits of this call, over those of the settings."""
        wanted = self.timeout
        if wanted is None:
            return settings
        if isinstance(wanted, Timeouts):
            return wanted
        if isinstance(wanted, str):
            if wanted not in PRESETS:
                raise ConfigError(f"timeout is a number of seconds or one of {', '.join(PRESETS)}, not {wanted!r}")
            return PRESETS[wanted]
        _number("timeout", wanted, 0, 86_400)
        return replace(settings, total=float(wanted))


_NAMES = tuple(each.name for each in fields(Options))
_NONE = Options()
_SHAPING = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar")
_DEFAULT = Params()


def _text(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name} is text, not {value!r:.60}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    above = name in {"timeout", "top_p"}  # zero of these would mean nothing at all
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low):
        raise ConfigError(f"{name} is a number {'above' if above else 'from'} {low:g} to {high:g}, not {value!r:.60}")


def _whole(name: str, value: object, low: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        raise ConfigError(f"{name} is a whole number{'' if low is None else f' from {low}'}, not {value!r:.60}")
