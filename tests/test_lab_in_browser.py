"""What a person sees: JupyterLab in a browser. The quickstart by `llmkit lab`, an answer that grows, one that attacks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import nbformat
import pytest

from tests.notebook.server import Gone, Server, Step, refused, said
from tests.test_markdown import HOSTILE

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET = ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture
def notebook(tmp_path):
    """The quickstart without its outputs, so that what is seen has just been made."""
    content = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text("utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    path = tmp_path / "quickstart.ipynb"
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.fixture
def lab(notebook, tmp_path):
    """The address of the notebook in a JupyterLab that `llmkit lab` has started."""
    with started(notebook, tmp_path) as address:
        yield address


@contextmanager
def started(notebook, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "LLMKIT_DISPLAY": "live", "PYTHONPATH": str(ROOT)}
    environment["JUPYTER_CONFIG_DIR"] = environment["JUPYTER_RUNTIME_DIR"] = str(home)
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=t", "--expose-app-in-browser", *QUIET]
    log = (tmp_path / "lab.log").open("w")
    command = [sys.executable, "-m", "llmkit", "lab", str(notebook), *options]
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token=t", process, tmp_path / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token=t"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
        with suppress(ProcessLookupError):  # its JupyterLab ends by itself, or is not left behind all the same
            for _ in range(50):
                os.killpg(process.pid, 0)
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def _wait_for(url, process, log):
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 3000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def opened(page, address):
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext?.isReady")


def test_the_quickstart_runs_from_top_to_bottom(lab, page) -> None:
    opened(page, lab)
    page.evaluate("window.jupyterapp.commands.execute('runmenu:run-all')")
    cells = "window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code')"
    page.wait_for_function(f"{cells}.every(w => w.model.executionCount)")
    outputs = page.evaluate(f"{cells}.map(w => w.model.outputs.toJSON())")
    kinds = [output["output_type"] for cell in outputs for output in cell]
    assert "error" not in kinds
    assert not [output for cell in outputs for output in cell if output.get("name") == "stderr"]
    answer = page.locator(".jp-OutputArea .jp-RenderedMarkdown", has_text="simulat").first
    answer.scroll_into_view_if_needed()
    assert answer.locator("strong").count() >= 1  # shown as Markdown, not as its source
    footer = page.locator(".jp-OutputArea .jp-RenderedHTMLCommon", has_text="→").first.inner_text()
    assert re.fullmatch(r"simulator · \d+ → \d+ tokens · \$0 · .* \(first token .*\) · simulated", footer.strip())


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cells(server, page, tmp_path):
    """Open a notebook with these cells, whose model is the server; llmkit is loaded in it."""
    (tmp_path / "llmkit.toml").write_text(server.settings(), "utf-8")
    path = tmp_path / "n.ipynb"

    @contextmanager
    def cells(*sources):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, path)
        with started(path, tmp_path) as address:
            opened(page, address)
            run(page, 0)
            ended(page, 0)
            yield address

    return cells


WIDGETS = "window.jupyterapp.shell.currentWidget.content.widgets"
HEIGHTS = """index => {
    const heights = window.heights = [0];
    const cell = document.querySelectorAll('.jp-Notebook .jp-CodeCell')[index];
    const look = () => {
        if (window.heights !== heights) return;
        const height = cell.querySelector('.jp-OutputArea')?.getBoundingClientRect().height ?? 0;
        if (heights.at(-1) !== height) heights.push(height);
        requestAnimationFrame(look);
    };
    look();
}"""
LINE = 24  # pixels


def run(page, index):
    page.evaluate(
        "index => { const notebook = window.jupyterapp.shell.currentWidget.content; notebook.activeCellIndex = index;"
        " notebook.deselectAll(); window.jupyterapp.commands.execute('notebook:run-cell'); }",
        index,
    )


def ended(page, index):
    page.wait_for_function(f"index => {WIDGETS}[index].model.executionCount", arg=index)
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    page.evaluate("() => new Promise(done => setTimeout(done, 300))")  # formulas are set after the text


def output(page, index):
    return page.locator(".jp-Notebook .jp-CodeCell").nth(index).locator(".jp-OutputArea").first


def falls(page):
    heights = page.evaluate("window.heights")
    return max((before - after for before, after in pairwise(heights)), default=0)


def test_an_answer_grows_without_jumping(cells, page, server) -> None:
    step = Step()
    pid = "import os; print(os.getpid())"
    with cells("%load_ext llmkit", "%%llm\nhi", "%%llm\nwait", pid, "%%llm\nand the kernel dies"):
        page.evaluate(HEIGHTS, 1)
        server.next(said(*pieces(BEFORE), step, *pieces(AFTER)))
        run(page, 1)
        assert step.reached.wait(60)
        shown = output(page, 1)
        shown.locator("pre code", has_text="return").wait_for()  # whole, although its fence is still open
        shown.get_by_text("tiny-1 is answering").wait_for()
        assert "```" not in shown.inner_text()
        step.go.set()
        ended(page, 1)
        assert falls(page) <= LINE
        assert shown.locator("table tbody tr").count() == 2
        assert shown.locator("mjx-container").count() == 2
        text = shown.inner_text()
        assert (text.count("Sorting"), text.count("tokens"), text.count("answering")) == (1, 1, 0)
        assert page.evaluate(f"{WIDGETS}[1].model.outputs.toJSON().map(o => Object.keys(o.data).length)") == [0, 2, 2]

        server.next(refused(503, "busy", retry_after="3"))
        page.evaluate(HEIGHTS, 2)
        run(page, 2)
        output(page, 2).get_by_text("retrying in 3 s").wait_for()
        output(page, 2).get_by_text("retrying in 2 s").wait_for()
        ended(page, 2)
        assert falls(page) <= LINE
        assert "1 retry (503)" in output(page, 2).inner_text()

        run(page, 3)
        ended(page, 3)
        kernel = int(output(page, 3).inner_text())
        server.next(said("The *beginning", gone := Gone()))
        run(page, 4)
        assert gone.reached.wait(60)
        output(page, 4).locator("em", has_text="beginning").wait_for()
        os.kill(kernel, signal.SIGKILL)
        page.wait_for_function(
            f"{WIDGETS.removesuffix('.content.widgets')}.sessionContext.session.kernel.status !== 'busy'"
        )
        assert "The beginning" in output(page, 4).inner_text()


def pieces(text):
    """Small ones, and now and then a pause in which what is there is drawn."""
    for at in range(0, len(text), 7):
        yield text[at : at + 7]
        if at % 35 == 0:
            yield pause


def pause(handler):
    time.sleep(0.06)


BEFORE = """## Sorting

Use **`sorted`** for a *new* list; see [the documentation](https://docs.python.org/3/howto/sorting.html), or pay $5 to $10.

```python
def biggest(values):
    return sorted(values)[-1]
"""
AFTER = """```

1. First
   ```bash
   echo "$HOME"
   ```
2. Second

| method | cost |
|:--|--:|
| `sorted` | $O(n \\log n)$ |
| `list.sort` | the same |

\\[
\\int_0^1 x^2\\,dx = \\frac{1}{3}
\\]

Done.
---

And a last line.
"""


def test_a_hostile_answer_does_nothing(cells, page, server) -> None:
    asked, dialogs = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    attacks = [text.replace("alert(1)", "window.ran=(window.ran||0)+1") for text in [*HOSTILE, *IN_LAB]]
    server.next(said(*(part for text in attacks for part in (text, "\n\n"))))
    server.next(*(said(text) for text in attacks))
    server.next(refused(400, "<img src=x onerror=window.ran=1> <script>window.ran=1</script> [x](javascript:alert(1))"))
    forms = ["text", "json", "code", "html"]
    with cells(
        "%load_ext llmkit",
        "%%llm --cache off -o hostile\nall at once",
        "ask = get_ipython().run_cell_magic\n"
        f"for number in range({len(attacks)}):\n    ask('llm', '--cache off', f'the attack {{number}}')",
        "%%llm --cache off\nan error",
        "hostile",
        f"for form in {forms}:\n    ask('llm', f'--format {{form}}', 'all at once')",
    ) as address:
        server.next(*(said(*attacks) for _ in forms))
        for index in range(1, 6):
            run(page, index)
            ended(page, index)
        nothing_happened(page, asked, dialogs)
        assert "window.ran" in output(page, 1).inner_text()  # shown as it was written
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        page.goto("about:blank")
        opened(page, address)
        nothing_happened(page, asked, dialogs)


IN_LAB = [
    "$\\href{javascript:alert(1)}{x}$ and $\\style{position:fixed}{x}$ $\\require{html}\\class{a}{b}$",
    'https://a.example/$" onmouseover="alert(1) autofocus onfocus="alert(1)$',
    '[x](https://a.example/$"onmouseover=alert(1)//$) ![x](//a.example/x.png)',
    'https://a.example/\\begin{a}" onmouseover="alert(1)\\end{a}',
    "```mermaid\ngraph TD\n A@{ img: 'https://a.example/x.png' }\n```",
    "```mermaid\ngraph TD\n A[\"<img src='https://a.example/y.png' onerror='alert(1)'>\"]\n click A href 'javascript:alert(1)'\n```",
    "\x1b[31mred\x1b]8;;javascript:alert(1)\x07link\x1b]8;;\x07 \u202egnp.exe",
    "<div style='position:fixed;top:0;left:0;width:100%;height:100%;background:red'>over it all</div>",
    "<form action=https://a.example><button>Log in</button></form><base href=https://a.example/>",
]


def nothing_happened(page, asked, dialogs):
    page.evaluate("() => new Promise(done => setTimeout(done, 500))")
    assert page.evaluate("window.ran") is None
    assert dialogs == []
    away = [
        url for url in asked if urlsplit(url).scheme not in {"data", "blob"} and urlsplit(url).hostname != "127.0.0.1"
    ]
    assert away == []
    answers = ".jp-OutputArea-output"
    assert (
        page.locator(f"{answers} :is(script, iframe, form, img[src*='example'], base, svg[onload], object)").count()
        == 0
    )
    handlers = page.evaluate(
        f"[...document.querySelectorAll('{answers} *')].filter(e => [...e.attributes].some(a => a.name.startsWith('on')))"
        ".map(e => e.outerHTML)"
    )
    assert handlers == []
    links = page.evaluate("[...document.querySelectorAll('.jp-RenderedMarkdown a')].map(a => a.getAttribute('href'))")
    assert [link for link in links if not link.startswith(("http://", "https://", "mailto:", "#"))] == []
    assert page.locator(f"{answers} :is(a, mjx-container *)[href^='javascript' i]").count() == 0
