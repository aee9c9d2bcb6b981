"""Compact JSON, as it is sent and stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["encoded", "scan"]

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_make: Any = json.encoder.c_make_encoder  # type: ignore[attr-defined]
_text: Any = json.encoder.encode_basestring

# What the encoder makes anew for each document, made once: half the cost of a short one.
_pieces: Callable[[Any, int], tuple[str, ...]] = (
    _make(None, _encoder.default, _text, None, ":", ",", False, False, False)
    if _make
    else lambda body, _: (_encoder.encode(body),)
)

scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
"""The document that begins at a place in a text, and where it ends; raises `StopIteration` or `ValueError`."""


def encoded(body: Any) -> bytes:
    """Compact JSON.

    Raises:
        ValueError, TypeError, RecursionError: for what JSON cannot say: NaN, sets, cycles.
    """
    return "".join(_pieces(body, 0)).encode(
        "utf-8", "replace"
    )  # "replace": a lone surrogate is a question mark, not a crash
