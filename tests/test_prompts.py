"""llmkit.prompts: the prompts of a project, by name and version."""

from __future__ import annotations

from contextlib import closing

import pandas as pd
import pytest

import llmkit
from llmkit.errors import ConfigError
from llmkit.prompts import Prompts, project_of
from llmkit.testing import FakeClock

KEY = "sk-fake-0123456789abcdefghijklmnop"  # no key of anything


@pytest.fixture
def prompts(tmp_path):
    prompts = Prompts(llmkit.Config.of(environ={"OPENAI_API_KEY": KEY}, state={"url": "memory"}), FakeClock(), tmp_path)
    yield prompts
    prompts.close()


def test_the_newest_version_is_meant_where_none_is_named(prompts) -> None:
    prompts.save("sum", "first")
    prompts.save("sum", "second", "Be terse.")
    assert (prompts.get("sum").text, prompts.get("sum").system) == ("second", "Be terse.")
    assert (prompts.get("sum@1").text, prompts.get("sum@1").reference) == ("first", "sum@1")


def test_an_unknown_name_names_the_nearest(prompts) -> None:
    prompts.save("summary", "x")
    with pytest.raises(ConfigError, match="no prompt is kept as sumary; did you mean summary"):
        prompts.get("sumary")
    with pytest.raises(ConfigError, match="no version 4 of the prompt summary: there is 1"):
        prompts.get("summary@4")


@pytest.mark.parametrize("name", ["", "a b", "a@1", "a,b", "-a", "_a", "../a", "a" * 81, 7, "a\n"])
def test_a_name_is_letters_digits_and_little_else(prompts, name) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a prompt"):
        prompts.save(name, "text")


@pytest.mark.parametrize("reference", ["a@", "a@0", "a@x", "a@1@2", "a@-1", "a@²", "a@99999999999"])
def test_a_version_is_a_number(prompts, reference) -> None:
    with pytest.raises(ConfigError, match="names no version"):
        prompts.get(reference)


@pytest.mark.parametrize("text", ["", " \n", "x" * 4_000_001, "\ud800", 7])
def test_what_cannot_be_kept_is_said(prompts, text) -> None:
    with pytest.raises(ConfigError):
        prompts.save("sum", text)
    assert list(prompts) == []


def test_the_key_of_a_model_of_the_settings_is_not_kept(tmp_path) -> None:
    model = {"provider": "vllm", "model": "m", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "MINE"}
    config = llmkit.Config.of(environ={"MINE": "plain words 0123"}, state={"url": "memory"}, models={"local": model})
    with closing(Prompts(config, FakeClock(), tmp_path)) as prompts:
        with pytest.raises(ConfigError, match="holds the key in MINE"):
            prompts.save("sum", "it is plain words 0123")
        assert list(prompts) == []


def test_a_providers_key_is_not_kept(prompts) -> None:
    for given in ({"text": f"use {KEY}"}, {"text": "x", "system": KEY}):
        with pytest.raises(ConfigError, match="holds the key in OPENAI_API_KEY") as caught:
            prompts.save("sum", **given)
        assert KEY not in caught.value.block()
    assert list(prompts) == []


def test_the_list_is_a_frame(prompts) -> None:
    assert list(prompts.list()) == ["name", "version", "saved", "text", "system", "raw"]
    prompts.save("b", "1")
    prompts.save("a", "2", "s", raw=True)
    frame = prompts.list()
    assert frame[["name", "version", "text", "system", "raw"]].to_numpy().tolist() == [
        ["a", 1, "2", "s", True],
        ["b", 1, "1", None, False],
    ]
    assert isinstance(frame["saved"].dtype, pd.DatetimeTZDtype)


def test_one_version_or_all_are_removed(prompts) -> None:
    for text in ("1", "2", "3"):
        prompts.save("sum", text)
    assert prompts.remove("sum@2") == 1
    assert [each.version for each in prompts.versions("sum")] == [1, 3]
    assert prompts.remove("sum") == 2
    with pytest.raises(ConfigError, match="no prompt is kept"):
        prompts.remove("sum")


def test_another_folder_is_another_project(prompts, tmp_path) -> None:
    other = prompts.of(tmp_path / "other")
    other.save("sum", "theirs")
    assert list(prompts) == []
    assert prompts.of(tmp_path / "other").get("sum").text == "theirs"


def test_the_project_is_the_folder_of_the_settings_else_where_one_is(tmp_path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert project_of(llmkit.Config.load(inner, environ={}), inner) == inner
    (tmp_path / "a" / "pyproject.toml").write_text('[tool.llmkit]\nmodel = "simulator"\n', "utf-8")
    assert project_of(llmkit.Config.load(inner, environ={}), inner) == tmp_path / "a"
    (inner / "llmkit.toml").write_text("", "utf-8")
    assert project_of(llmkit.Config.load(inner, environ={})) == inner


def test_both_clients_hold_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = llmkit.Config.of(model="simulator", state={"url": f"sqlite:///{tmp_path}/l.sqlite3"})
    with llmkit.Client(config=config) as client:
        assert client.prompts.save("sum", "text").reference == "sum@1"
        assert client.prompts.project == tmp_path
    with llmkit.Client(config=config) as client:
        assert client.prompts.get("sum").text == "text"
