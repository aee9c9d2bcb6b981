"""How a comparison looks: cards, marks, and nothing of a model's or a server's that is not escaped."""

from __future__ import annotations

import asyncio
import re
from decimal import Decimal
from html.parser import HTMLParser

import pytest

from llmkit import Config
from llmkit.client import AsyncClient
from llmkit.notebook import grid
from llmkit.testing import FakeClock, Fault, Simulator

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) </div></div> \x1b[31mred\x1b[0m \x07"
    ' "quoted" & $5 or $10 \\(x\\)'
)
TAGS = {"div", "span", "strong", "ins", "del", "br"}


class Seen(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.depth = set(), set(), 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.depth += tag != "br"

    def handle_endtag(self, tag):
        self.depth -= 1


def trials_of(answer, *faults, clock=None, before=(), **asked):
    """The trials of a comparison over models ``a``, ``b`` and ``c`` (or others), as they have ended."""
    simulator = Simulator(answer, clock=clock or FakeClock(), models=["a", "b", "c"])
    for fault in faults:
        simulator.fail(fault)
    models = {
        name: {"provider": "own", "model": name, "price": {"input": cost, "output": cost}}
        for name, cost in (("a", 2), ("b", 1), ("c", 2))
    }
    config = Config.of(
        model="a",
        models=models,
        providers={"own": {"base_url": "http://127.0.0.1:9/v1"}},
        state={"url": "memory"},
        retry={"attempts": 1},
    )

    async def run():
        async with AsyncClient(transport=simulator, config=config, clock=clock) as client:
            for prompt in before:
                await client.complete(prompt)
            made = await client._comparison("hi", **({"models": "a,b,c"} | asked))
            await made.run(client)
            return made.trials

    return asyncio.run(run())


def shown(trials, **more):
    cards = grid.ended(trials, **({"timings": False} | more))
    line = grid.summary(trials)
    return grid.as_html(cards, line), grid.as_text(cards, line), cards


def test_a_hostile_answer_is_text_and_nothing_else() -> None:
    trials = trials_of(lambda body: HOSTILE if body["model"] == "a" else HOSTILE.replace("red", "blue"))
    html, text, _ = shown(trials)
    live = grid.as_html(grid.growing(trials, lambda _: HOSTILE), (), live=True)
    for page in (html, live):
        seen = Seen(page)
        assert seen.tags <= TAGS
        assert seen.attributes <= {"style", "role", "aria-label", "aria-busy", "tabindex"}
        assert seen.depth == 0
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
        assert "$" not in page
    assert "&lt;script&gt;" in html
    assert "\x1b" not in text
    assert "\x07" not in text


def test_hostile_names_and_errors_are_text_too() -> None:
    trials = trials_of("x", Fault.status(400, message=HOSTILE), models=["a"], prompts={HOSTILE: "hi"})
    assert trials[0].status == "failed"
    html, text, _ = shown(trials)
    assert Seen(html).tags <= TAGS
    assert "alert(1)" in html
    assert "\x1b" not in text


def test_lines_and_indentation_are_kept() -> None:
    html, text, _ = shown(trials_of("def f():\n    return 1\n", models="a"))
    assert "def f():\n    return 1" in html
    assert "white-space: pre-wrap" in html
    assert "def f():\n    return 1" in text


def test_the_cheapest_is_marked_and_ties_are_marked_together() -> None:
    _, _, cards = shown(trials_of("the same"))
    assert [card.marks for card in cards] == [[], ["cheapest"], []]
    _, _, cards = shown(trials_of(lambda body: "x" if body["model"] != "c" else "x y z", models="a,c", repeat=2))
    assert [card.marks for card in cards] == [["cheapest"], ["cheapest"], [], []]


def test_where_all_tie_none_is_marked() -> None:
    _, _, cards = shown(trials_of("the same", models="a,c"))
    assert [card.marks for card in cards] == [[], []]


def test_an_answer_from_the_cache_costs_what_it_had_cost_and_is_not_the_fastest() -> None:
    clock = FakeClock()
    trials = trials_of("the same", clock=clock, before=["hi"])
    assert [trial.reply.source for trial in trials] == ["cache", "provider", "provider"]
    for trial, latency in zip(trials, (0.001, 2.0, 1.0), strict=True):
        trial.reply.latency_s = latency
    _, _, cards = shown(trials, timings=True)
    assert [card.marks for card in cards] == [[], ["cheapest"], ["fastest"]]


def test_times_that_read_the_same_tie() -> None:
    trials = trials_of("the same")
    for trial, latency in zip(trials, (1.01, 1.02, 3.0), strict=True):
        trial.reply.latency_s = latency
    _, _, cards = shown(trials, timings=True)
    assert ["fastest" in card.marks for card in cards] == [True, True, False]


def test_what_failed_is_neither_cheap_nor_fast_nor_compared() -> None:
    _, text, cards = shown(trials_of("the same", Fault.status(400, message="no"), concurrency=1))
    assert cards[0].status.startswith("InvalidRequest: ")
    assert (cards[0].marks, cards[1].difference) == ([], None)
    assert cards[2].difference.note == "the same as answer 2"
    assert "3 answers · 2 whole · 1 failed · $" in text


def test_a_long_answer_is_cut_where_it_is_shown_and_says_so() -> None:
    html, text, cards = shown(trials_of("word " * 10_000, models="a"))
    assert len(html) < 30_000
    assert len(text) < 30_000
    more = len(cards[0].text) - grid.MOST_SHOWN
    assert more > 20_000
    assert f"… and {more:,} characters more, in the variable" in html


def test_many_answers_share_the_room() -> None:
    html, _, _ = shown(trials_of("word " * 2_000, models="a", repeat=50, concurrency=50))
    assert 400_000 < len(html) < 500_000


def test_while_it_grows_every_card_has_the_same_bounds_and_says_what_goes_on() -> None:
    trials = trials_of("x")
    for trial, status in zip(trials, ("waiting", "answering", "failed"), strict=True):
        trial.status = status
        trial.reply = None
    trials[2].error = ValueError("no\nsuch thing")
    html = grid.as_html(grid.growing(trials, lambda trial: f"{trial.status} …"), (), live=True)
    heights = re.findall(r" ((?:min-|max-)?height): ([\d.]+\w+)", html)
    assert heights == heights[:3] * 3
    assert [name for name, _ in heights[:3]] == ["min-height", "max-height", "height"]
    assert [word in html for word in ("waiting …", "answering …", "ValueError: no such thing")] == [True] * 3
    assert 'aria-busy="true"' in html


@pytest.mark.parametrize("live", [True, False])
def test_it_can_be_reached_by_the_keyboard_and_is_named(live) -> None:
    trials = trials_of("x", temperatures=[0.7], prompts={"sum@1": "hi"}, repeat=2)
    cards = grid.growing(trials, str) if live else grid.ended(trials, timings=False)
    html = grid.as_html(cards, (), live=live)
    assert html.count('tabindex="0"') == 6
    assert 'aria-label="answer 2: a, temperature 0.7, sum@1, sample 2"' in html


def test_the_sum_says_what_is_unknown() -> None:
    trials = trials_of("x")
    assert grid.summary(trials)[1].text == "$0.00001 in all"
    trials[0].reply.call.trail.attempts.clear()
    trials[1].reply = None
    trials[1].sent = True
    trials[1].attempts.clear()
    assert "of unknown cost" in grid.summary(trials)[1].text
    assert all(isinstance(trial.cost_usd, Decimal | None) for trial in trials)
