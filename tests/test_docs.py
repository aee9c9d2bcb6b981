"""What the documentation says is true: its code runs, its settings are valid, its links lead somewhere."""

from __future__ import annotations

import asyncio
import re
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llmkit.config import Config
from llmkit.providers.catalog import CATALOG, QUIRKS
from llmkit.settings import flat_names
from llmkit.testing import Fault

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LAYERS = sorted(path.stem for path in (ROOT / "llmkit" / "layers").glob("*.py") if path.stem != "__init__")
HEADINGS = ["About", "Usage", "Defaults", "Telemetry", "Diagram", "Patterns", "Anti-patterns"]
LANGUAGES = {"python", "ipython", "toml", "console", "text"}


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(page):
    text = page.read_text("utf-8")
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[2], textwrap.dedent(match[3]), text[: match.start()].count("\n") + 1)


def named(page):
    return page.relative_to(ROOT).as_posix()


def with_blocks(*languages):
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


@pytest.fixture
def shell(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False
    yield shell
    if "llmkit" in shell.extension_manager.loaded:
        shell.run_line_magic("unload_ext", "llmkit")
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("page", with_blocks("python", "ipython"), ids=named)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, shell) -> None:
    for block in blocks(page):
        if block.language in {"python", "ipython"}:
            result = shell.run_cell(block.code)
            assert result.success, (
                f"{named(page)}, line {block.line}: {result.error_before_exec or result.error_in_exec!r}"
            )
    client = shell.user_ns.get("client")
    if client is not None and hasattr(client, "close"):
        client.close()


@pytest.mark.parametrize("page", with_blocks("toml"), ids=named)
def test_the_settings_of_a_page_are_valid(page, tmp_path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            tomllib.loads(block.code)
            (tmp_path / "llmkit.toml").write_text(block.code, "utf-8")
            Config.load(tmp_path, environ={"OPENAI_API_KEY": "k" * 20, "ANTHROPIC_API_KEY": "k" * 20})


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_says_its_language(page) -> None:
    assert [(b.language, b.line) for b in blocks(page) if b.language not in LANGUAGES] == []


def anchors(page):
    for heading in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_a_page_with_the_same_headings(layer) -> None:
    page = ROOT / "docs" / "layers" / f"{layer}.md"
    assert re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE) == HEADINGS


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [named(page) for page in PAGES if page.parent != ROOT and page.stem != "index"]
    assert [page for page in missing if f"({page.removeprefix('docs/')})" not in index] == []


def test_every_setting_provider_and_quirk_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    scopes = {path[:2] for path, _ in flat_names().values() if len(path) == 3 and path[:2] != ("budget", "request")}
    settings = {".".join(path) for path, _ in flat_names().values() if path[:2] not in scopes}
    wanted = {*settings, *(".".join(scope) for scope in scopes), *CATALOG, *QUIRKS}
    wanted |= {name for entry in CATALOG.values() for name in (entry.api_key_env, entry.base_url_env) if name}
    assert [name for name in sorted(wanted) if f"`{name}`" not in page] == []


def test_the_defaults_in_the_table_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    config = Config.of()
    for table, settings in (("timeout", config.timeouts), ("retry", config.retry), ("breaker", config.breaker)):
        for name in (path[-1] for path, _ in flat_names().values() if path[0] == table and path[-1] != "preset"):
            row = re.search(rf"^\| `{table}\.{name}` \| ([\d.]+) \|", page, re.MULTILINE)
            assert row, f"{table}.{name}"
            assert float(row[1]) == getattr(settings, name)
    assert f"| `budget.request.usd` | {config.budget.request_usd} |" in page


def test_every_option_of_a_cell_and_every_command_is_documented() -> None:
    from llmkit.notebook import arguments, commands

    page = (ROOT / "docs" / "notebook.md").read_text("utf-8")
    options = {name for action in arguments._PARSER._actions for name in action.option_strings if name.startswith("--")}
    short = {"--model": "-m", "--system": "-s", "--output": "-o", "--temperature": "-t"}
    assert [name for name in sorted(options) if short.get(name, name) not in page and name != "--help"] == []
    assert [name for name in commands._COMMANDS if name != "status" and f"`%llm {name}" not in page] == []


def test_every_command_of_the_shell_is_documented() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    names = [path.stem for path in (ROOT / "llmkit" / "commands").glob("*.py") if path.stem != "__init__"]
    assert [name for name in names if f"llmkit {name}" not in text] == []


def test_every_fault_is_documented() -> None:
    page = (ROOT / "docs" / "testing.md").read_text("utf-8")
    faults = [name for name, value in vars(Fault).items() if isinstance(value, classmethod)]
    assert len(faults) > 20
    assert [name for name in faults if f"Fault.{name}(" not in page] == []


def test_no_loop_is_left_running_by_the_pages() -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
