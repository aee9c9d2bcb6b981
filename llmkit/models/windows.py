"""How much a model takes and gives: its context window, its most output tokens, and whether it reasons first."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from llmkit.models import table

if TYPE_CHECKING:
    from llmkit.endpoint import Endpoint

__all__ = ["is_reasoning", "max_output", "window"]

# OpenAI's models that think before they answer. They take ``max_completion_tokens`` in place of ``max_tokens`` and
# refuse a temperature. The ``-chat`` ones of the same series do not think.
_REASONING = re.compile(r"(?:[\w.-]+/)*(?:ft:)?(?:o[134](?:-|$)|codex-mini|gpt-[5-9](?!\d)(?!.*-chat))")


@lru_cache(maxsize=256)
def is_reasoning(model: str) -> bool:
    """Whether ``model`` is one of OpenAI's reasoning models, by its name alone."""
    return _REASONING.match(model.lower()) is not None


# Most output tokens as their makers publish them, first match wins. Only what is certain stands here: a number too
# low would cut answers short, one too high would be refused by the provider.
_MOST_OUTPUT = tuple(
    (re.compile(pattern), tokens)
    for pattern, tokens in (
        (r"gpt-5(?:\.\d)?(?:-[a-z]+)*-chat", 16_384),
        (r"gpt-5-pro", 272_000),
        (r"gpt-5(?:\.[12])?(?:-(?:mini|nano|codex|pro|\d{4}))*(?:-|$)", 128_000),
        (r"gpt-4\.1", 32_768),
        (r"gpt-4o-2024-05-13", 4_096),
        (r"gpt-4o(?:-mini)?(?:-\d{4}|$)|chatgpt-4o", 16_384),
        (r"gpt-4-(?:turbo|1106|0125|vision)", 4_096),
        (r"gpt-4(?:-0\d{3})?$", 8_192),
        (r"gpt-3\.5-turbo", 4_096),
        (r"o1-mini", 65_536),
        (r"o1-preview", 32_768),
        (r"o1|o3|o4-mini", 100_000),
        (r"claude-3-5-", 8_192),
        (r"claude-3-7-", 64_000),
        (r"claude-3-", 4_096),
        (r"claude-opus-4(?:-[01])?(?:-\d{8}|$)", 32_000),
        (r"claude-(?:sonnet-4(?:-[056])?|haiku-4-5|opus-4-5)(?:-\d{8}|$)", 64_000),
        (r"gemini-2\.5-", 65_536),
        (r"gemini-(?:1\.5|2\.0)-", 8_192),
    )
)
_MAKER = re.compile(r"^(?:openrouter/)?(?:openai|azure|azure_ai|anthropic|google|gemini|vertex_ai|models)/")


def window(endpoint: Endpoint) -> int | None:
    """Context window in tokens; None where unknown, as on the user's own servers, which set their own.

    The first question about a hosted model loads the price table (0.15 s).
    """
    if endpoint.window is not None or endpoint.local or endpoint.simulated:
        return endpoint.window
    return table.window(endpoint.provider, endpoint.base_url, endpoint.model)


def max_output(endpoint: Endpoint) -> int | None:
    """Most output tokens the model gives, reasoning included; None where unknown."""
    if endpoint.max_output is not None or endpoint.local or endpoint.simulated:
        return endpoint.max_output
    return _most_output(endpoint.model)


@lru_cache(maxsize=256)
def _most_output(model: str) -> int | None:
    name = _MAKER.sub("", model.lower()).removeprefix("ft:")
    return next((tokens for pattern, tokens in _MOST_OUTPUT if pattern.match(name)), None)
