"""What a cell asks: its line and its text, with the notebook's variables filled in, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.call import messages_from
from llmkit.errors import ConfigError
from llmkit.images import illustrated
from llmkit.notebook.prompts import fill, tagged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.call import Message
    from llmkit.notebook.arguments import CellLine
    from llmkit.notebook.chats import Chats, Place
    from llmkit.prompts import KeptPrompt

__all__ = ["Question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and what goes with it.

    Attributes:
        prompt: what `llmkit.Client.stream` takes: text, or messages.
        options: its options; ``model`` is among them where the cell or ``%config`` names one.
        template: the cell's text before its variables were filled in, behind the kept one that it begins with.
        kept: that one; None where there is none.
        parts: what each ``{{ … }}`` has put into the prompt: the expression, and its text.
    """

    prompt: str | list[Message]
    options: dict[str, Any]
    template: str
    kept: KeptPrompt | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def model(self) -> str:
        """The model that it is for, or the tier."""
        model: str = self.options.get("model") or self.options["tier"]
        return model

    @classmethod
    def of(
        cls,
        said: CellLine,
        cell: str,
        *,
        settings: Mapping[str, Any],
        names: tuple[Mapping[str, Any], ...],
        kept: KeptPrompt | None = None,
    ) -> Question:
        """Fill in the prompt and check all that was said.

        Args:
            settings: options of cells that say nothing else, as ``%config`` has them.
            names: the notebook's variables; those of later mappings win.
            kept: what ``--with`` names.

        Raises:
            ConfigError: nothing to ask, or an impossible option.
            TemplateError: the prompt cannot be filled in.
        """
        from llmkit.options import Options

        instead = {"model": "tier", "tier": "model"}  # each names the model, so what the cell says replaces both
        replaced = {instead[name] for name in instead if name in said.options}
        options = {name: value for name, value in settings.items() if name not in replaced} | said.options
        of_settings = kept is None or kept.system is None
        system = (options if of_settings else said.options).get("system")
        filled = fill(cell, system, kept, raw=said.raw, names=names)
        prompt = filled.text
        if filled.system is not None:
            options["system"] = filled.system
        if kept is not None:
            options["tags"] = tagged(said.options.get("tags"), kept.reference)
        if not prompt.strip():
            raise ConfigError("the prompt is empty", next_step="it stands below the line with %%llm")
        if said.schema:
            from llmkit.notebook.schemas import schema_of

            options["schema"] = schema_of(said.schema, names)
        if said.images:
            from llmkit.notebook.pictures import pictures

            options["images"] = pictures(said.images, *names)
        options["template"] = filled.template
        Options.of(options)
        return cls(prompt=prompt, options=options, template=filled.template, kept=kept, parts=filled.parts)

    def within(self, name: str, chats: Chats, place: Place, said: CellLine) -> Question:
        """The same as the next turn of the conversation ``name``, whose system prompt holds until a cell says another."""
        options = dict(self.options)
        began, system = chats.system(name, place)
        if began and "system" not in said.options and (self.kept is None or self.kept.system is None):
            options.pop("system", None)
            options |= {} if system is None else {"system": system}
        prompt = self.prompt
        if images := options.pop("images", None):  # with its turn, so that later ones may speak of them
            prompt = list(illustrated(messages_from(prompt), images))
        return replace(self, prompt=chats.messages(name, prompt, place), options=options)
