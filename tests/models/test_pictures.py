"""What pictures cost: never less than the published rules come to."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmkit.call import Message
from llmkit.images import Picture
from llmkit.models import pictures, tokens
from tests.pictures import png_url

SIDES = st.integers(1, 10_000)

# The rules as their makers publish them, written down apart from the code that bounds them.


def tiles(width, height):
    scale = min(1, 2048 / max(width, height))
    width, height = width * scale, height * scale
    scale = min(1, 768 / min(width, height))
    return math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def patches(width, height):
    if math.ceil(width / 32) * math.ceil(height / 32) <= 1536:
        return math.ceil(width / 32) * math.ceil(height / 32)
    shrink = math.sqrt(32**2 * 1536 / (width * height))
    columns, rows = width * shrink / 32, height * shrink / 32
    fits = min(math.floor(columns) / columns, math.floor(rows) / rows) if columns >= 1 and rows >= 1 else 1
    return min(1536, math.ceil(columns * fits) * math.ceil(rows * fits))


def pixels(width, height):
    scale = min(1, 1568 / max(width, height), math.sqrt(1_176_000 / (width * height)))
    return width * scale * height * scale / 750


def crops(width, height):
    side = math.floor(min(width, height) / 1.5)
    return 1 if max(width, height) <= 384 else math.ceil(width / side) * math.ceil(height / side)


RULES = {
    "gpt-4o": lambda w, h: 85 + 170 * tiles(w, h),
    "gpt-4o-mini": lambda w, h: 2_833 + 5_667 * tiles(w, h),
    "gpt-4.1": lambda w, h: 85 + 170 * tiles(w, h),
    "gpt-5": lambda w, h: 70 + 140 * tiles(w, h),
    "o3": lambda w, h: 75 + 150 * tiles(w, h),
    "gpt-4.1-mini": lambda w, h: 1.62 * patches(w, h),
    "gpt-4.1-nano": lambda w, h: 2.46 * patches(w, h),
    "gpt-5-mini": lambda w, h: 1.62 * patches(w, h),
    "gpt-5-nano": lambda w, h: 2.46 * patches(w, h),
    "o4-mini": lambda w, h: 1.72 * patches(w, h),
    "claude-haiku-4-5": pixels,
    "gemini-2.5-flash": lambda w, h: min(50_000, 258 * crops(max(w, 2), max(h, 2))),
    "claude-3-5-sonnet-latest": pixels,
}


@pytest.mark.parametrize("model", RULES)
@given(SIDES, SIDES)
@example(1600, 3203)  # a side that is no whole number once it has been made smaller
def test_no_picture_costs_more_than_its_bound(model, width, height) -> None:
    bound = pictures.bound(model, (width, height))
    assert RULES[model](width, height) <= bound <= pictures.bound(model)


@pytest.mark.parametrize(
    "model, size, tokens_published",
    [
        ("gpt-4o", (1024, 1024), 765),
        ("gpt-4o", (2048, 4096), 1_105),
        ("gpt-4.1-mini", (1024, 1024), 1_659),
        ("gpt-5-nano", (1024, 1024), 2_520),
        ("gemini-2.5-pro", (960, 540), 6 * 258),
        ("gemini-3-pro-preview", (1024, 1024), 1_120),
        ("claude-sonnet-4-5", (1092, 1092), 1_590),
        ("claude-sonnet-4-5", (200, 200), 54),
    ],
)
def test_the_bound_is_near_the_published_examples(model, size, tokens_published) -> None:
    bound = pictures.bound(model, size)
    assert tokens_published <= bound <= 1.25 * tokens_published + 1_000


@pytest.mark.parametrize("model", ["", "gemini-4-pro", "Qwen/Qwen3-VL-8B", "gpt-5.7", "gpt-6", "llava", "o5"])
def test_families_without_published_rules_have_no_bound(model) -> None:
    assert pictures.bound(model, (100, 100)) is None
    text = [{"type": "image_url", "image_url": {"url": png_url()}}]
    assert tokens.upper_bound([Message("user", text)], model=model) > tokens.MOST_TOKENS_PER_IMAGE


def test_names_with_their_maker_are_the_same() -> None:
    for name in ("openai/gpt-4o", "openrouter/openai/gpt-4o", "GPT-4o-2024-08-06", "ft:gpt-4o-2024-08-06:us::x"):
        assert pictures.bound(name) == pictures.bound("gpt-4o") == 85 + 8 * 170
    assert pictures.bound("anthropic/claude-opus-4-5") == 5_000


def test_what_is_sent_is_counted_by_its_size() -> None:
    def bound(part):
        return tokens.upper_bound([Message("user", [part])], model="gpt-4o")

    small = Picture.of(png_url(300, 200))
    claude = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": small.url.partition(",")[2]},
    }
    on_the_web = Picture.of("https://x.test/a.png")
    assert bound(claude) == bound(small.part) < bound(on_the_web.part)
    assert bound(on_the_web.part) - bound({"type": "text", "text": ""}) == 85 + 8 * 170
    many = [Message("user", [small.part] * 3)]
    assert tokens.upper_bound(many, model="gpt-4o") - bound(small.part) == 2 * pictures.bound("gpt-4o", (300, 200))
