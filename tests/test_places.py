"""The line of every setting in a TOML source."""

from __future__ import annotations

import tomllib

import pytest

from llmkit.places import line_of, lines

SOURCE = '''\
# a comment = 1
top = "a # b = [" # another

[a.b]                       # line 4
"quoted \\u0041 key" = 1
'literal.key' = """
three = 1
\\"""
lines"""
after.dotted . more = 2
[ a . c ]
array = [
  1, # one
  [2, 3],
  { x = 1, y = { z = [ "}", ']' ] } },
  \'\'\'
  long \'\'\',
]
last = 1979-05-27 07:32:00
[[items]]
n = 1
[[items]]
n = 2
[items.sub]
deep = true
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 2),
        (("a",), 4),
        (("a", "b"), 4),
        (("a", "b", "quoted A key"), 5),
        (("a", "b", "literal.key"), 6),
        (("a", "b", "after"), 10),
        (("a", "b", "after", "dotted", "more"), 10),
        (("a", "c"), 11),
        (("a", "c", "array", 0), 13),
        (("a", "c", "array", 1, 1), 14),
        (("a", "c", "array", 2, "y", "z", 1), 15),
        (("a", "c", "array", 3), 16),
        (("a", "c", "last"), 19),
        (("items", 0, "n"), 21),
        (("items", 1, "n"), 23),
        (("items", 1, "sub", "deep"), 25),
        (("a", "c", "no such key"), 11),
        (("nothing",), None),
    ],
)
def test_each_setting_has_its_line(path, line) -> None:
    assert line_of(SOURCE, path) == line


def test_every_path_of_the_parsed_file_is_found() -> None:
    found = lines(SOURCE)

    def walk(node: object, path: tuple[str | int, ...]) -> None:
        if path:
            assert path in found
        if isinstance(node, dict | list):
            for name, item in node.items() if isinstance(node, dict) else enumerate(node):
                walk(item, (*path, name))

    walk(tomllib.loads(SOURCE), ())


@pytest.mark.parametrize("source", ["", "[", "a = [", "a = {", "= 1", "a", 'a = """', "a = " + "[" * 50_000])
def test_what_is_no_toml_ends_too(source) -> None:
    assert isinstance(lines(source), dict)
