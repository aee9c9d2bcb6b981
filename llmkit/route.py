"""From a model's name to the links of its route.

A name is ``provider:model``, an alias of ``[models]``, ``simulator``, a name that everyone knows the provider of
(``gpt-5-mini``, ``claude-haiku-4-5``), or several of these with commas between: a chain. The part before the first
colon is a provider only where a provider has that name, so Ollama's ``qwen3:8b`` is written ``ollama:qwen3:8b``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.endpoint import Endpoint, Link, Price
from llmkit.errors import ConfigError
from llmkit.providers.catalog import located, moved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.providers.catalog import ProviderEntry
    from llmkit.settings import Fail, Place

__all__ = ["LONGEST", "LONGEST_MODEL", "Routes"]

LONGEST = 50
"""The most links a route may have once all its aliases are followed."""

LONGEST_MODEL = 500
"""Characters of a model's name: those of local models may be paths."""

_CACHED = 256
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_SINGLE_KEYS = ("provider", "model", "base_url", "api_key_env", "price", "window", "max_output", "max_concurrency")


class Routes:
    """The routes of one configuration. ``models`` and ``entries`` are checked settings; nothing here reads a file."""

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Any]],
        entries: Mapping[str, ProviderEntry],
        environ: Mapping[str, str],
        fail: Fail,
    ) -> None:
        self._models = models
        self._entries = entries
        self._environ = environ
        self._fail = fail
        self._known: dict[str, tuple[Link, ...]] = {}

    def links(self, names: str) -> tuple[Link, ...]:
        """The links of one name, or of several with commas between.

        Raises:
            ConfigError: on a name that leads nowhere, with the nearest one that does.
        """
        known = self._known.get(names)
        if known is not None:
            return known
        parts = [part.strip() for part in names.split(",")]
        if not all(parts):
            from llmkit.settings import shown

            raise ConfigError(f"{shown(names)} is no model: a name is missing")
        links = tuple(link for part in parts for link in self._one(part, (), ()))
        self._bounded(links, names, ())
        if len(self._known) < _CACHED:
            self._known[names] = links
        return links

    def check(self, names: str, path: Place) -> None:
        """Follow the names of a setting at ``path``, so that an error can say where it stands."""
        for part in names.split(","):
            self._one(part.strip(), path, ())

    def check_endpoint(self, name: str, path: Place) -> None:
        """A setting at ``path`` is about one endpoint: an alias would match none, and nobody would notice."""
        endpoints = dict.fromkeys(link.endpoint.name for link in self._one(name, path, ()))
        if name not in endpoints:
            from llmkit.settings import shown

            raise self._fail(f"{shown(name)} is no endpoint's name; write {' or '.join(endpoints)}", path)

    def _one(self, name: str, path: Place, above: tuple[str, ...]) -> tuple[Link, ...]:
        if name in above:
            ring = " → ".join((*above[above.index(name) :], name))
            raise self._fail(f"the alias {name} leads back to itself: {ring}", path)
        if name not in self._models:
            return (Link(endpoint=self._endpoint(name, path)),)
        settings, here = self._models[name], ("models", name)
        if "chain" not in settings:
            links: tuple[Link, ...] = (Link(endpoint=self._single(name, settings)),)
        else:
            if own := [key for key in _SINGLE_KEYS if key in settings]:
                raise self._fail(f"models.{name} is a chain, so {own[0]} has no place there", (*here, own[0]))
            links = ()
            for index, entry in enumerate(settings["chain"]):
                step = (*here, "chain", index)
                links += tuple(_limited(link, entry) for link in self._one(entry["model"], step, (*above, name)))
                self._bounded(links, name, step)
        return tuple(_limited(link, settings) for link in links)

    def _bounded(self, links: tuple[Link, ...], name: str, path: Place) -> None:
        if len(links) > LONGEST:
            from llmkit.settings import shown

            raise self._fail(f"{shown(name)} has more than {LONGEST} links", path)

    def _split(self, name: str) -> tuple[str, str] | None:
        provider, colon, model = name.partition(":")
        if colon and provider in self._entries:
            return (provider, model) if model.strip() else None
        if name in self._entries and self._entries[name].simulated:
            return name, name
        for entry in self._entries.values():
            if entry.bare_models and re.match(entry.bare_models, name):
                return entry.name, name
        return None

    def _endpoint(self, name: str, path: Place) -> Endpoint:
        split = self._split(name)
        if split is None:
            raise self._unknown(name, path)
        self._check_model(split[1], path)
        return _endpoint_at(located(self._entries[split[0]], self._environ), split[1])

    def _check_model(self, model: str, path: Place) -> None:
        """It is shown in terminals and tables, and is a part of keys."""
        from llmkit.settings import shown

        if _UNFIT.search(model):
            raise self._fail(f"{shown(model)} is no model's name: it has control characters", path)
        if len(model) > LONGEST_MODEL:
            raise self._fail(f"{shown(model)} is no model's name: it has more than {LONGEST_MODEL} characters", path)

    def _unknown(self, name: str, path: Place) -> ConfigError:
        from llmkit.settings import nearest, shown

        provider, colon, model = name.partition(":")
        if colon and provider in self._entries:
            return self._fail(f"{shown(name)} names no model after the colon", path)
        if colon and (near := nearest(provider, self._entries)):
            hint = (
                f"; did you mean {near}:{model}?"
                if shown(model) == repr(model)
                else f"; did you mean the provider {near}?"
            )
        elif near := nearest(name, [*self._models, *self._entries]):
            hint = f"; did you mean {near}?" if near in self._models else f"; did you mean {near}:MODEL?"
        else:
            hint = "; a model is provider:model or an alias of [models]"
        step = f"aliases: {', '.join(self._models) or 'none'}; providers: {', '.join(self._entries)}"
        return self._fail(f"there is no alias or provider for {shown(name)}{hint}", path, step)

    def _single(self, alias: str, settings: Mapping[str, Any]) -> Endpoint:
        here = ("models", alias)
        if "model" not in settings:
            raise self._fail(f"models.{alias} needs model, or a chain", here)
        entry, model = self._provider(alias, settings)
        self._check_model(model, (*here, "model"))
        if entry.simulated and "base_url" in settings:
            raise self._fail("the simulator has no base_url", (*here, "base_url"))
        entry = self._moved(entry, settings, here) if "base_url" in settings else located(entry, self._environ)
        if "api_key_env" in settings:
            named = settings["api_key_env"]
            entry = replace(entry, api_key_env=named, key_required=named is not None and not entry.local)
        price = Price(**settings["price"]) if "price" in settings else None
        return _endpoint_at(
            entry, model, price=price, window=settings.get("window"), max_output=settings.get("max_output")
        )

    def _provider(self, alias: str, settings: Mapping[str, Any]) -> tuple[ProviderEntry, str]:
        model = settings["model"]
        if "provider" in settings:
            name = settings["provider"]
            if name not in self._entries:
                from llmkit.settings import nearest, shown

                near = nearest(name, self._entries)
                hint = f"; did you mean {near}?" if near else "; describe it in [providers]"
                raise self._fail(
                    f"there is no provider {shown(name)}{hint}",
                    ("models", alias, "provider"),
                    f"providers: {', '.join(self._entries)}",
                )
            return self._entries[name], model.removeprefix(f"{name}:")
        here = ("models", alias, "model")
        if (split := self._split(model)) is None:
            if model in self._models:
                raise self._fail(f'models.{alias}.model names an alias; write chain = ["{model}"]', here)
            raise self._unknown(model, here)
        return self._entries[split[0]], split[1]

    def _moved(self, entry: ProviderEntry, settings: Mapping[str, Any], here: Place) -> ProviderEntry:
        if "api_key_env" in settings:
            return replace(entry, base_url=settings["base_url"], base_url_env=None)
        try:
            return moved(entry, settings["base_url"])
        except ValueError as error:
            raise self._fail(
                f"{error} and is not sent to another host unasked",
                (*here, "base_url"),
                'say which key goes there: api_key_env = "NAME", or "off" for none',
            ) from None


def _endpoint_at(
    entry: ProviderEntry,
    model: str,
    *,
    price: Price | None = None,
    window: int | None = None,
    max_output: int | None = None,
) -> Endpoint:
    return Endpoint(
        provider=entry.name,
        model=model.strip(),
        base_url=entry.base_url,
        wire=entry.wire,
        api_key_env=entry.api_key_env,
        key_required=entry.key_required,
        local=entry.local,
        simulated=entry.simulated,
        price=price,
        window=window,
        max_output=max_output,
        quirks=entry.quirks,
    )


def _limited(link: Link, limits: Mapping[str, Any]) -> Link:
    """The link under further limits: the lower of two holds, and what is disabled anywhere is disabled."""
    changes: dict[str, Any] = {}
    for name in ("max_cost_usd", "max_latency_s"):
        given, had = limits.get(name), getattr(link, name)
        if given is not None:
            changes[name] = given if had is None else min(given, had)
    if limits.get("disabled"):
        changes["disabled"] = True
    if limits.get("on"):
        changes["only_on"] = link.only_on | limits["on"]
    return replace(link, **changes) if changes else link
