"""The arrows between the modules run one way; loading stays light; the public names are all there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import llmkit

PACKAGE = Path(llmkit.__file__).parent

# From the top down. A module may import what stands below it and, within a package, what stands beside it.
ORDER = [
    {"__main__"},
    {"commands"},
    {"notebook", "dashboard", "reports", "bulk", "evals"},
    {"client", "doctor"},
    {"comparison", "tape"},
    {"options", "caps", "alerts", "export", "planner", "prompts", "spending"},
    {"config", "portal"},
    {"route"},
    {"settings"},
    {"layers", "providers"},
    {"transport", "testing"},
    {"pipeline"},
    {"recording"},
    {"ledger", "cache"},
    {"answer"},
    {"budgets", "rows", "refusal", "worstcase"},
    {"allowance"},
    {"state", "models", "guards"},
    {"flight"},
    {"outlet", "reply"},
    {"images", "line", "schema"},
    {"call", "drawing", "events", "failure", "plan"},
    {
        "calendar",
        "circuit",
        "clock",
        "compact",
        "account",
        "endpoint",
        "environment",
        "jsontext",
        "lock",
        "markdown",
        "places",
        "redaction",
        "shield",
        "shorthand",
        "strictness",
    },
    {"errors"},
    {"money"},
]
RANK = {part: rank for rank, parts in enumerate(reversed(ORDER)) for part in parts}
VAGUE = {"util", "utils", "helper", "helpers", "common", "manager", "misc", "base", "core", "tools", "types"}
HEAVY = {
    "httpx",
    "aiohttp",
    "pandas",
    "numpy",
    "altair",
    "ipywidgets",
    "tiktoken",
    "genai_prices",
    "tenacity",
    "jinja2",
    "redis",
    "jsonschema_rs",
    "pydantic",
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def part_of(path):
    """The entry of ORDER that a file belongs to; None for the package's own front page."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def only_for_typing(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def runtime_imports(tree):
    """Every llmkit module that ``tree`` imports when it runs, those inside functions included."""
    for node in ast.iter_child_nodes(tree):
        if only_for_typing(node):
            yield from (name for other in node.orelse for name in runtime_imports(other))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "llmkit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "llmkit":
                yield from (f"llmkit.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("llmkit."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from runtime_imports(node)


def arrows():
    """(from file, part it belongs to, imported name, part of that name), for every import at run time."""
    for path in modules():
        for name in runtime_imports(tree_of(path)):
            yield path.relative_to(PACKAGE).as_posix(), part_of(path), name, name.split(".")[1]


def test_every_module_has_its_place_in_the_order() -> None:
    assert {part_of(path) for path in modules()} - {None} <= set(RANK)


def test_no_arrow_runs_back_up() -> None:
    found = list(arrows())
    wrong = [
        f"{file} imports {name}"
        for file, part, name, target in found
        if part is not None and target in RANK and part != target and RANK[part] <= RANK[target]
    ]
    assert len(found) > 100  # the walk does see them
    assert wrong == []


def test_what_is_imported_from_the_front_page_has_a_home_of_its_own() -> None:
    """``from llmkit import Client`` inside the package would be an arrow to the top in disguise."""
    wrong = [f"{file} imports {name}" for file, _, name, target in arrows() if target not in RANK]
    assert [each for each in wrong if not each.endswith("__version__")] == []


def test_layers_know_no_layer_no_provider_no_store() -> None:
    wrong = [
        f"{file} imports {name}"
        for file, part, name, target in arrows()
        if part == "layers" and file != "layers/__init__.py" and target in {"layers", "providers", "state", "ledger"}
    ]
    assert wrong == []


def test_wire_formats_do_not_know_each_other() -> None:
    wires = {"openai", "anthropic"}
    wrong = [
        f"{file} imports {name}"
        for file, part, name, _ in arrows()
        if part == "providers" and Path(file).stem in wires and name.split(".")[2] in wires
    ]
    assert wrong == []


def names_a_provider(node):
    """``provider == "openai"``, or the like: a decision by name that belongs into the catalog."""
    if not isinstance(node, ast.Compare) or not ast.unparse(node.left).split(".")[-1].startswith("provider"):
        return False
    return any(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in ast.walk(node))


def test_providers_are_told_apart_by_data_alone() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in modules()
        if part_of(path) not in {"providers", "testing"}
        for node in ast.walk(tree_of(path))
        if names_a_provider(node)
    ]
    assert wrong == []


def test_files_are_named_for_what_they_hold() -> None:
    assert [path.name for path in modules() if path.stem in VAGUE] == []


def public_names(path):
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_is_public_and_explains_it(path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "a module says what it is for"
    names = public_names(path)
    if names is None:
        assert not tree.body[1:] or path.name == "__main__.py", "a module says what is public in __all__"
        return
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    silent = [name for name in names if name in defined and not ast.get_docstring(defined[name])]
    assert silent == []


def after(*lines):
    """What of HEAVY is in ``sys.modules`` of a new interpreter after these lines."""
    code = "\n".join([*lines, f"import json, sys; print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_llmkit_is_light() -> None:
    assert after("import llmkit") == []


def test_loading_the_extension_is_light() -> None:
    shell = "from IPython.core.interactiveshell import InteractiveShell; s = InteractiveShell.instance()"
    before = after(shell)
    assert set(after(shell, "s.run_line_magic('load_ext', 'llmkit')")) == set(before)


def test_the_command_line_is_light() -> None:
    assert after("import llmkit.__main__") == []


def test_every_public_name_is_there() -> None:
    assert sorted(set(llmkit.__all__)) == sorted(llmkit.__all__)
    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
    assert set(llmkit.__all__) <= set(dir(llmkit))


def test_the_names_that_the_surface_promises_are_public() -> None:
    promised = {"Client", "AsyncClient", "Config", "Message", "Plan", "Reply", "Usage"}
    assert promised <= set(llmkit.__all__)
    assert {"Simulator", "FakeClock"} <= set(dir(llmkit.testing))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = llmkit.nothing


def test_every_error_is_in_the_tree_that_its_docstring_draws() -> None:
    drawn = set((llmkit.errors.__doc__ or "").replace("│", " ").replace("├─", " ").replace("└─", " ").split())
    assert [name for name in llmkit.errors.__all__ if name not in drawn] == []
    for name in llmkit.errors.__all__:
        assert issubclass(getattr(llmkit, name), llmkit.LLMKitError)
