r"""A model's Markdown may be an attack. The browser itself is asked in test_lab_in_browser.py."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistune import create_markdown

from llmkit.markdown import DOLLAR as D
from llmkit.markdown import harmless, plain

# A renderer that trusts everything: what it makes of a text is what the text could have done.
render = create_markdown(escape=False, plugins=["table", "strikethrough", "url", "footnotes", "math"])
TAG = re.compile(r"<\s*(/?[A-Za-z!?][^\s>/]*)([^>]*)>")
KNOWN = {"p", "br", "sub", "sup", "kbd", "mark", "span", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li"}
KNOWN |= {
    "blockquote",
    "pre",
    "code",
    "em",
    "strong",
    "del",
    "hr",
    "a",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}


def dangers(html: str) -> list[str]:
    """What a page would do that had this in it."""
    found = []
    for name, attributes in TAG.findall(html):
        if name.lstrip("/").lower() not in KNOWN:
            found.append(name)
        found += re.findall(r"\bon\w+\s*=|\bsrc\s*=|\bstyle\s*=(?!\"text-align)", attributes)
        found += [
            href
            for href in re.findall(r'href="([^"]*)"', attributes)
            if not re.match(r"https?://|mailto:|#|ftp://", href)
        ]
    return found


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <iframe src=https://evil.example></iframe>",
    "<style>body{display:none}</style>",
    "<!-- -->\n<svg/onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x]( \n javascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x) [y](file:///etc/passwd) [z](command:run)",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[x][y]\n\n> [y]:\n> javascript:alert(1)",
    "<javascript:alert(1)>",
    "![x](https://evil.example/x.png)",
    "!![x](https://evil.example/x.png)",
    "[![x](https://evil.example/x.png)](https://evil.example)",
    "`<img src=x onerror=alert(1)>`",
    "\\`<img src=x onerror=alert(1)>`",
    "https://x.example/`<img src=x onerror=alert(1)>`",
    "| `a | <img src=x onerror=alert(1)> | b` |\n|--|--|--|",
    "- ```html\n  <img src=x onerror=alert(1)>\n  ```",
    "> ```\n> x\n<img src=x onerror=alert(1)>",
    "1. a\n   ```\n   x\nb\n<img src=x onerror=alert(1)>\n```\n<img src=y onerror=alert(1)>\n```",
    "~~~\n```\n<img src=x onerror=alert(1)>\n~~~",
    "````\n```\n<img src=x onerror=alert(1)>\n````",
    "      ```\n<img src=x onerror=alert(1)>\n      ```",
    "```\nx\n      ```\n```\n<img src=x onerror=alert(1)>\n```",
    '[a]: x "\n\n```html\n" <img src=x onerror=alert(1)>\n```',
    "$$\n```html\n$$<img src=x onerror=alert(1)>\n```",
    "\\begin{a}\n\n```html\n\\end{a}<img src=x onerror=alert(1)>\n```",
    '```$" onmouseover="alert(1)$\nx\n```',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_does_nothing(text) -> None:
    assert dangers(render(harmless(text))) == []


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_the_renderer_of_these_tests_would_do_it(text) -> None:
    assert dangers(render(text)) != []


PIECES = [
    *'\n\n `$<>[]()!|*_~:"\\#-1.@&{}',
    "```",
    "~~~",
    "    ",
    "\n> ",
    "\n- ",
    "\n```html\n",
    "\n```\n",
    "<img src=x onerror=a>",
]
PIECES += [
    "](javascript:a)",
    "](https://a.example",
    "![a](https://b.example)",
    "$$",
    "\\begin{a}",
    "\\end{a}",
    "[a]: x",
    "<!--",
]
PIECES += [
    "https://a.example/",
    "</code>",
    "&lt;",
    "word",
    '"',
    "\\[",
    "\\]",
    "\\(",
    "\\)",
    "<br>",
    "<pre>",
    "<https://a.example>",
]


@settings(max_examples=600)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_no_mixture_of_it_does_anything(text) -> None:
    assert dangers(render(harmless(text))) == []


@given(st.text())
def test_any_text_is_shown_without_control_characters(text) -> None:
    assert harmless(text) == plain(harmless(text))


@pytest.mark.parametrize(
    "text",
    [
        '# A *heading*\n\n- one\n- [two](https://a.example/b_(c) "title")\n\n| a | b |\n|---|---|\n| 1 | `x[0]` |\n',
        '```python\nif a < b:\n    print(f"{x[1:]}")\n```\nand `ls -l | wc` and <br> H<sub>2</sub>O',
        '1. Run:\n   ```bash\n   echo "$HOME" $1\n   ```\n2. Done',
        "a < b and b > c, 1 <2, <3 !",
        "$x^2$ and $$\\frac{a}{b}$$\n\n$$\n\\sum_i x_i \\\\\n$$\n\n\\begin{align}\na &= b\n\\end{align}",
        "mail [me](mailto:a@b.example) or see [above](#a-heading)",
    ],
)
def test_what_does_no_harm_stays_as_it_is(text) -> None:
    assert harmless(text) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("`<b>`", "<code>&#60;b&#62;</code>"),
        ("x\n```html\n<b>\n```\ny", "x\n\n```html\n<b>\n```\n\ny"),
        ("```\n<b>\n```", "```text\n<b>\n```\n"),
        ("- a\n  ```html\n  <b>\n    <i>\n  ```", "- a\n  <pre><code>&#60;b&#62;&#10;  &#60;i&#62;</code></pre>"),
        ("![a cat](https://a.example/c.png)", "[image: a cat](https://a.example/c.png)"),
        ("<https://a.example/x>", "https://a.example/x"),
        ("[x](javascript:y)", "[x]&#40;javascript:y)"),
        ("$a<b$ and a<b", "$a< b$ and a&lt;b"),
        ("\\(x\\) and\n\\[\ny\n\\]\n\\[ z \\]", "$x$ and\n$$\ny\n$$\n$$ z $$"),
        (r"$\href{javascript:x}{y}$", r"$\mathrm{href}{javascript:x}{y}$"),
        ("```mermaid\ngraph TD; A-->B\n```", "```mermaid\ngraph TD; A-->B\n```\n"),
        ('```mermaid\nA@{ img: "https://a.example" }\n```', '```text\nA@{ img: "https://a.example" }\n```\n'),
        ("a\u202eb\x1b[31mc\x00", "abc"),
        ('https://a.example/$"onmouseover=x$', f'https://a.example/{D}"onmouseover=x{D}'),
    ],
)
def test_what_could_do_harm_is_shown_as_it_was_written(text, shown) -> None:
    assert harmless(text) == shown
