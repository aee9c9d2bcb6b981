"""A comparison as a person sees it in JupyterLab: side by side, stacked in a narrow window, and only text."""

from __future__ import annotations

import pytest

from llmkit.testing import Fault, Simulator
from tests import test_lab_in_browser as lab
from tests.test_lab_in_browser import cells, page  # noqa: F401 - fixtures
from tests.test_markdown import HOSTILE

pytestmark = lab.pytestmark

TEXT = "\n".join(["<script>document.title = 'taken'</script>", *HOSTILE])
CARDS = '[aria-label^="answer "][role="group"]'


class Served:
    """The simulator as the ``server`` of these notebooks: two models of it, and one that it does not have."""

    def __init__(self, url):
        self.url = url

    def settings(self):
        lines = ['model = "a"']
        for name in ("a", "b", "ghost"):
            lines += [f"[models.{name}]", 'provider = "vllm"', f'model = "{name}"', f'base_url = "{self.url}"']
            lines += ["price = { input = 1.0, output = 2.0 }"]
        return "\n".join(lines) + "\n"


@pytest.fixture
def simulator():
    return Simulator(lambda body: f"{TEXT}\n{body['model']}", models=["a", "b"])


@pytest.fixture
def server(simulator):
    with simulator.server(port=0) as url:
        yield Served(url)


def boxes(page):  # noqa: F811
    """Where the cards are, all at one moment."""
    return page.evaluate(
        f"[...document.querySelectorAll('{CARDS}')].map(card => card.getBoundingClientRect().toJSON())"
    )


def test_cards_stand_side_by_side_and_are_stacked_where_it_is_narrow(cells, page, simulator) -> None:  # noqa: F811
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    simulator.fail(Fault.slow(0.5, 0.03), times=2)
    with cells("%load_ext llmkit", "%%llm_compare -m a,b,ghost\nhi"):
        page.set_viewport_size({"width": 1600, "height": 1500})
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
        page.evaluate(lab.HEIGHTS, 1)
        lab.run(page, 1)
        page.wait_for_selector('[aria-label="comparison"][aria-busy="true"]')
        growing = {tuple(round(box[side]) for side in ("y", "height")) for box in boxes(page)}
        assert len(growing) == 1  # all in one row, of one height, …
        lab.ended(page, 1)
        page.wait_for_selector('[aria-label="comparison"]:not([aria-busy])')
        assert page.locator('[aria-label="comparison"]').count() == 1  # … and in the end there once, …
        assert lab.falls(page) <= lab.LINE  # … without a jump
        first, second, third = boxes(page)
        assert first["y"] == second["y"] == third["y"]
        assert first["x"] < second["x"] < third["x"]
        assert "ModelNotFound" in page.locator(CARDS).nth(2).inner_text()
        shown = page.locator('[aria-label="comparison"]')
        assert shown.locator("script, img, iframe, a, svg, style, form, input").count() == 0
        assert "<script>" in shown.inner_text()
        page.set_viewport_size({"width": 400, "height": 1500})
        page.wait_for_function(
            f"new Set([...document.querySelectorAll('{CARDS}')].map(c => c.getBoundingClientRect().x)).size === 1"
        )
        assert page.evaluate(
            "[...document.querySelectorAll('[aria-label=comparison]')].every(g => g.scrollWidth <= g.clientWidth)"
        )
        assert dialogs == []
