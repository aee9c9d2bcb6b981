"""llmkit.notebook.missing: which names a template lacks, and what of it is there all the same."""

from __future__ import annotations

import pytest

from llmkit.notebook.missing import missing, present


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("plain {x}", []),
        ("{{ a }} {{ b.c }} {{ d[e] | upper }}", ["b", "d", "e"]),
        ("{% for x in rows %}{{ x }}{{ y }}{% endfor %}", ["rows", "y"]),
        ("{% set z = 1 %}{{ z }} {{ len(a) }}", []),
        ("{{ a", []),
    ],
)
def test_the_names_that_nobody_has_are_found(text, lacking) -> None:
    assert missing(text, {"a": "x"}) == lacking


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("say {{ a }} and {{ b }}!", "say AAA and !"),
        ("{{ a | lower }}{{ b | upper }}", "aaa"),
        ("x{% if b %}yes{% else %}no{% endif %}z", "xz"),
        ("x{% for i in b %}{{ i }} of {{ a }}{% endfor %}{{ a }}", "xAAA"),
        ("x{% set c = 1 %}y", "xy"),
        ("x{% set c %}block{% endset %}y", "xy"),
        ("{% raw %}{{ b }}{% endraw %}", "{{ b }}"),
        ("{{ a.nothing.at.all }}.", "."),
        ("{{ 1 // 0 }}.", "."),
    ],
)
def test_what_is_there_is_never_more_than_there_will_be(text, there) -> None:
    assert present(text, {"a": "AAA"}) == there
