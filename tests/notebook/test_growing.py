"""What is drawn of an answer that is still arriving."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistune import create_markdown

from llmkit.notebook.growing import LONGEST_WAIT, drawable

html = create_markdown(plugins=["table", "strikethrough", "math"])


@pytest.mark.parametrize(
    "text, drawn",
    [
        ("", ""),
        ("Hello", "Hello"),
        ("Hello\n", "Hello"),
        ("Hello **wor", "Hello **wor**"),
        ("Hello **", "Hello "),
        ("Hello *wor", "Hello *wor*"),
        ("Hello *world* or", "Hello *world* or"),
        ("2 * 3 is", "2 * 3 is"),
        ("Hello **world**", "Hello **world**"),
        ("say `x = [1", "say `x = [1`"),
        ("see [the do", "see "),
        ("see [the docs](https://a.exam", "see "),
        ("see [the docs](https://a.example)", "see [the docs](https://a.example)"),
        ("a ![pict", "a "),
        ("x <b", "x "),
        ("A title\n--", "A title"),
        ("A title\n=", "A title"),
        ("one\n- ", "one"),
        ("one\n- two", "one\n- two"),
        ("one\n1", "one"),
        ("one\n##", "one"),
        ("text\n``", "text"),
        ("text\n```py", "text"),
        ("text\n```python\n", "text\n```python\n\n```"),
        ("text\n```python\nx = 1", "text\n```python\nx = 1\n```"),
        ("text\n```python\nx = 1\n``", "text\n```python\nx = 1\n```"),
        ("text\n```python\nx = 1\n```", "text\n```python\nx = 1\n```"),
        ("~~~~\n```\nx", "~~~~\n```\nx\n~~~~"),
        ("- a\n  ```\n  x", "- a\n  ```\n  x\n  ```"),
        ("> ```\n> x", "> ```\n> x\n> ```"),
        ("```mermaid\ngraph TD; A-->B", "```text\ngraph TD; A-->B\n```"),
        ("so\n\n| a | b |", "so"),
        ("so\n\n| a | b |\n|--", "so"),
        ("so\n\n| a | b |\n", "so"),
        ("so\n\n| a | b |\n|--|--|\n| 1", "so\n\n| a | b |\n|--|--|"),
        ("so\n\n| a | b |\n|--|--|\n| 1 | 2 |\n", "so\n\n| a | b |\n|--|--|\n| 1 | 2 |"),
        ("it is\n\n$$\nx^2", "it is"),
        ("it is \\(x^", "it is "),
        ("it is\n\\[\nx^2\n\\]", "it is\n\\[\nx^2\n\\]"),
        ("it is $$" + "x" * LONGEST_WAIT, "it is $$" + "x" * LONGEST_WAIT),
    ],
)
def test_what_is_half_written(text, drawn) -> None:
    assert drawable(text) == drawn


LONG = """# Title

Some **bold** and *italic* text with `code`, [a link](https://a.example/x_(y)) and a price of $5.

- one
- two
  - three

  ```python
  def f():
      return 1
  ```

| a | b |
|---|---|
| 1 | `x` |
| 2 | y |

> quoted

$$
x^2
$$

1. first
2. second

~~~
plain
~~~
The end.
"""


def blocks(text):
    """The blocks of a text, by their kinds; what an open fence or a half table would change."""
    return [token["type"] for token in create_markdown(renderer=None, plugins=["table", "math"])(text)]


def test_no_block_turns_into_another_one_while_it_grows() -> None:
    whole = [kind for kind in blocks(LONG) if kind != "blank_line"]
    for at in range(len(LONG) + 1):
        shown = [kind for kind in blocks(drawable(LONG[:at])) if kind != "blank_line"]
        assert shown == whole[: len(shown)], repr(LONG[:at])


def test_it_only_grows() -> None:
    before = 0
    for at in range(len(LONG) + 1):
        lines = drawable(LONG[:at]).rstrip("`~ \n").count("\n")
        assert lines >= before - 1, repr(LONG[:at])
        before = lines


@given(st.text(alphabet="`~$|-*#[]()<>\\\n ab1"))
def test_any_text_can_be_drawn(text) -> None:
    html(drawable(text))
    assert len(drawable(text)) <= len(text) * 2 + 10
