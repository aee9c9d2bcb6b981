"""What the magics put into a shell, each with the way to take it back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmkit.notebook.completion import Completer
    from llmkit.notebook.magics import LLMMagics

__all__ = ["Kept", "changed_settings", "complete", "handle_errors", "register", "take_back"]

log = logging.getLogger("llmkit")


class Kept(NamedTuple):
    """What a reload hands from the magics that go to those that come.

    Attributes:
        edition: changes when the package is reloaded; the same one means that it was only unloaded and loaded.
        settings: what was set by ``%config`` or a command, by the names of the traits.
        carried: see `LLMMagics.carried`.
    """

    edition: object
    settings: dict[str, Any]
    carried: dict[str, Any]


def register(shell: Any, magics: Any) -> Callable[[], None]:
    """Register ``magics``. Taken back, what had these names before has them again."""
    manager = shell.magics_manager
    name = type(magics).__name__
    before = {(kind, each): manager.magics[kind].get(each) for kind, names in magics.magics.items() for each in names}
    registered = manager.registry.get(name)
    shell.register_magics(magics)

    def give_back() -> None:
        for (kind, each), function in before.items():
            if manager.magics[kind].get(each) != magics.magics[kind][each]:
                continue  # somebody has taken the name since
            if function is None:
                del manager.magics[kind][each]
            else:
                manager.magics[kind][each] = function
        if manager.registry.get(name) is magics:
            manager.registry.pop(name)
            if registered is not None:
                manager.registry[name] = registered
        shell.configurables[:] = [each for each in shell.configurables if each is not magics]

    return give_back


def handle_errors(shell: Any, kind: type[BaseException], show: Callable[..., None]) -> tuple[Any, Callable[[], None]]:
    """Let ``show`` show errors of ``kind``. Returns the handler that was there before, too.

    Taken back only where nobody has put a handler over it since: that one may still call this one.
    """
    before = shell.custom_exceptions, shell.CustomTB
    shell.set_custom_exc((kind, *shell.custom_exceptions), show)
    ours = shell.CustomTB

    def give_back() -> None:
        if shell.CustomTB is ours:
            shell.custom_exceptions, shell.CustomTB = before

    return before[1], give_back


def changed_settings(magics: Any) -> dict[str, Any]:
    """What has been set since the magics were made: what differs from IPython's own configuration and the defaults."""
    given: Mapping[str, Any] = magics.shell.config.get(type(magics).__name__, {})
    return {
        name: value
        for name in magics.trait_names(config=True)
        if (value := getattr(magics, name)) != (given[name] if name in given else magics.trait_defaults(name))
    }


def take_back(undo: list[Callable[[], object]]) -> None:
    """Do it all, the last first, whatever fails."""
    while undo:
        each = undo.pop()
        try:
            each()
        except Exception:  # the rest must be taken back all the same
            log.exception("unloading: %r failed", each)


def complete(magics: LLMMagics) -> Callable[[], None]:
    """Let Tab offer what llmkit knows. What it takes for that is loaded by the first Tab in a cell of llmkit's."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    matchers = getattr(getattr(magics.shell, "Completer", None), "custom_matchers", None)
    if matchers is None:
        return lambda: None
    opened: list[Completer] = []

    @context_matcher(identifier="llmkit")  # type: ignore[untyped-decorator]
    def match(context: Any) -> dict[str, Any]:
        if "%llm" not in context.full_text:
            return {"completions": []}
        from llmkit.notebook.completion import MOST, Completer

        if not opened:
            opened.append(Completer(magics))
        offer = opened[0].of(context.full_text, context.cursor_line, context.cursor_position)
        if offer is None or not offer.words:
            return {"completions": []}
        found = [SimpleCompletion(text=word, type=offer.kind) for word in offer.words[:MOST]]
        return {"completions": found, "matched_fragment": offer.fragment, "suppress": True}

    matchers.append(match)

    def give_back() -> None:
        if match in matchers:
            matchers.remove(match)

    return give_back
