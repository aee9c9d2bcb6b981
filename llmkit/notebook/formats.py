"""How an answer goes out: what MIME types hold it, in each of the formats of ``--format``.

A model's text is nobody's friend. It goes out as harmless Markdown or as plain text, never as HTML: under ``--format
html`` its source is shown. Plain text loses its control characters, since a terminal would obey them.
"""

from __future__ import annotations

import json
import re

from llmkit.markdown import DOLLAR, MAX_MARKDOWN, harmless, plain, spelled
from llmkit.notebook.growing import drawable

__all__ = ["DOLLAR", "MAX_JSON", "bundle", "growing_markdown", "plain"]

MAX_JSON = 2_000_000
"""Characters up to which JSON is parsed to be shown indented."""

# As JupyterLab shows plain text, so that nothing moves when it becomes that.
_AS_TEXT = (
    'style="margin: 0; padding: 0 var(--jp-code-padding, 5px); font-size: var(--jp-code-font-size, inherit);'
    ' line-height: var(--jp-code-line-height, inherit); white-space: pre-wrap;"'
)
_BACKTICKS = re.compile(r"`{3,}")


def bundle(text: str, form: str) -> dict[str, str]:
    """``text`` as a MIME bundle."""
    if form == "json":
        text = _indented(text)
    if form == "text" or len(text) > MAX_MARKDOWN:
        return {"text/plain": plain(text)}
    markdown = harmless(text) if form == "markdown" else _as_code(text, form)
    return {"text/markdown": markdown, "text/plain": plain(text)}


def growing_markdown(text: str, form: str) -> str:
    """What has arrived of ``text``, as Markdown."""
    if form == "markdown" or (form == "code" and text.lstrip().startswith("```")):
        return harmless(drawable(text))
    return f"<pre {_AS_TEXT}>{spelled(plain(text))}</pre>" if form == "text" else _as_code(text, form)


def _indented(text: str) -> str:
    body = _inside_fence(text)
    if len(body) > MAX_JSON:
        return body
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return body


def _inside_fence(text: str) -> str:
    """What stands inside the one fence that is the whole text, or the text."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and body.count("```") == 2 and "\n" in body:
        return body.removesuffix("```").split("\n", 1)[1].strip()
    return text


def _as_code(text: str, form: str) -> str:
    if form == "code" and "```" in text:
        return harmless(text)  # the model fenced its code itself, and knows its language
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    language = "" if form == "code" else form
    return f"{fence}{language}\n{plain(text).strip(chr(10))}\n{fence}"
