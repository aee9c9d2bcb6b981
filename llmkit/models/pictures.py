"""How many tokens a picture may cost: by the published rules of the model's family, never fewer than it will be billed.

OpenAI's older models cut a picture into tiles of 512 pixels, its smaller and newer ones into patches of 32; Anthropic's
take about one token for 750 pixels, Google's 258 for each crop. Where two readings of a rule are possible, the dearer one
is taken. A family whose rules are not published has no bound here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import ceil
from typing import NamedTuple

__all__ = ["bound"]

_LONGEST, _SHORTEST, _TILE = 2048, 768, 512
_MOST_TILES = 8  # 2048 × 768
_MOST_PATCHES = 1536


class _Tiles(NamedTuple):
    """``base`` tokens, and ``each`` for every tile of 512 pixels."""

    base: int
    each: int

    def tokens(self, size: tuple[int, int] | None) -> int:
        return self.base + self.each * (_MOST_TILES if size is None else _tiles(*size))


class _Patches(NamedTuple):
    """``factor`` tokens for every patch of 32 pixels, of at most 1,536."""

    factor: float

    def tokens(self, size: tuple[int, int] | None) -> int:
        patches = _MOST_PATCHES if size is None else min(_MOST_PATCHES, ceil(size[0] / 32) * ceil(size[1] / 32))
        return ceil(patches * self.factor) + 1


class _Pixels(NamedTuple):
    """A token for 750 pixels or for a patch of 28 × 28, whichever is more; at most ``most``."""

    most: int

    def tokens(self, size: tuple[int, int] | None) -> int:
        if size is None:
            return self.most
        width, height = size
        patches = ceil(width / 28) * ceil(height / 28)
        return min(self.most, max(patches, ceil(width * height / 750)) * 6 // 5 + 100)


class _Dearer(NamedTuple):
    """Two rules of which it is unsure which one holds."""

    one: _Tiles
    other: _Patches

    def tokens(self, size: tuple[int, int] | None) -> int:
        return max(self.one.tokens(size), self.other.tokens(size))


class _Crops(NamedTuple):
    """258 tokens for each crop of two thirds of the shorter side, of at most 768 pixels; never below ``least``."""

    least: int
    most: int

    def tokens(self, size: tuple[int, int] | None) -> int:
        if size is None:
            return self.most
        side = min(768, max(1, min(size) * 2 // 3))
        return min(self.most, max(self.least, 258 * ceil(size[0] / side) * ceil(size[1] / side)))


_Rule = _Tiles | _Patches | _Pixels | _Dearer | _Crops

# First match wins. The families whose picture tokens are published; newer ones may have other rules.
_FAMILIES: tuple[tuple[re.Pattern[str], _Rule], ...] = tuple(
    (re.compile(rf"(?:openrouter/)?(?:openai/|anthropic/|google/|gemini/|models/)?(?:ft:)?{family}"), rule)
    for family, rule in (
        (r"gpt-4o-mini", _Tiles(2_833, 5_667)),
        (r"gpt-(?:4\.1-mini|5-mini)(?:-\d{4}|$)", _Patches(1.62)),
        (r"gpt-(?:4\.1-nano|5-nano)(?:-\d{4}|$)", _Patches(2.46)),
        (r"o4-mini", _Patches(1.72)),
        (r"gpt-4\.1(?!-mini|-nano)", _Dearer(_Tiles(85, 170), _Patches(1.0))),
        (r"(?:gpt-4o|chatgpt-4o|gpt-4\.5|gpt-4-turbo|gpt-4-vision)(?!-mini|-nano)", _Tiles(85, 170)),
        (r"gpt-5(?:-chat-latest|-\d{4}[\d-]*)?$", _Tiles(70, 140)),
        (r"o[13](?:-pro)?(?:-\d{4}[\d-]*)?$", _Tiles(75, 150)),
        (r"claude-", _Pixels(5_000)),
        (r"gemini-(?:1\.5|2\.[05])-", _Crops(2_240, 50_000)),
        (r"gemini-3[.-]", _Crops(2_240, 2_240)),  # at the finest resolution; 1,120 where nothing is said
    )
)


def bound(model: str, size: tuple[int, int] | None = None) -> int | None:
    """Tokens that a picture of ``size`` (width and height in pixels) cannot exceed; None where the rules are unknown.

    Without ``size``: what the largest picture takes.
    """
    rule = _rule(model)
    return None if rule is None else rule.tokens(size)


@lru_cache(maxsize=256)
def _rule(model: str) -> _Rule | None:
    return next((rule for family, rule in _FAMILIES if family.match(model.lower())), None)


def _tiles(width: int, height: int) -> int:
    """Tiles of a picture that is made to fit 2048 × 2048, and then 768 on its shorter side, larger or smaller."""
    shorter, longer = sorted((width, height))
    narrow = shorter
    if longer > _LONGEST:  # rounded down, the shorter side makes the longer one longer; rounded up, it takes more tiles
        narrow = max(1, shorter * _LONGEST // longer)
        shorter, longer = ceil(shorter * _LONGEST / longer), _LONGEST
    tiles = ceil(_SHORTEST / _TILE) * ceil(longer * _SHORTEST / narrow / _TILE)
    if shorter <= _SHORTEST:  # whether a small one is made larger is said in two ways
        tiles = max(tiles, ceil(shorter / _TILE) * ceil(longer / _TILE))
    return min(_MOST_TILES, tiles)
