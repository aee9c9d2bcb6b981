"""What the simulated services see of the pictures in a request, in either wire format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.images import Picture

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["seen"]


def seen(contents: Iterable[Any]) -> tuple[str, ...]:
    """The pictures in the contents of messages, each in words, such as ``PNG, 640 × 480, 12.3 kB``.

    Raises:
        ValueError: one could not be looked at, as the services say it.
    """
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return tuple(_seen(part) for part in parts if part.get("type") in {"image_url", "image"})


def _seen(part: dict[str, Any]) -> str:
    url = _url(part)
    if not isinstance(url, str) or not url.startswith(("data:", "https://", "http://")):
        raise ValueError("a picture needs a URL: https://…, http://… or data:image/…;base64,…")
    try:
        picture = Picture.of(url)
    except ConfigError as error:
        raise ValueError(f"could not process image: {error}") from None
    return str(picture) if picture.format is not None else f"at {picture}, not looked at"


def _url(part: dict[str, Any]) -> Any:
    if part["type"] == "image_url":
        image = part.get("image_url")
        return image.get("url") if isinstance(image, dict) else image
    source = part.get("source")
    if not isinstance(source, dict):
        return None
    if source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    return source.get("url")
