"""`llmkit lab`, as a person sees it: JupyterLab in a browser, every cell of the quickstart run from top to bottom."""

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
from pathlib import Path
from urllib.request import urlopen

import pytest

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
        yield f"http://127.0.0.1:{port}/lab/tree/quickstart.ipynb?token=t"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
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


def test_the_quickstart_runs_from_top_to_bottom(lab, page) -> None:
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext?.isReady")
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
