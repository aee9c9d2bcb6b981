"""llmkit.state.prompts: versions of prompts, in a file and in memory, for several kernels at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest

from llmkit.errors import StoreError
from llmkit.state.database import Database
from llmkit.state.prompts import APPLICATION_ID, MIGRATIONS, open_prompts, prompts_path


def url_of(tmp_path):
    return f"sqlite:///{tmp_path}/l.sqlite3"


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    store = open_prompts("memory" if request.param == "memory" else url_of(tmp_path))
    yield store
    store.close()


def save(store, text, name="sum", project="/p", system=None, raw=False, now=1.0):
    return store.save(project, name, text, system=system, raw=raw, now=now)


def test_versions_count_from_one(store) -> None:
    assert [save(store, text).reference for text in ("a", "b", "c")] == ["sum@1", "sum@2", "sum@3"]
    assert [each.text for each in store.versions("/p", "sum")] == ["a", "b", "c"]


def test_the_same_again_is_the_version_that_it_was(store) -> None:
    save(store, "a", now=1.0)
    save(store, "b", now=2.0)
    again = save(store, "a", now=3.0)
    assert (again.version, again.saved) == (1, 1.0)
    assert len(store.versions("/p", "sum")) == 2


@pytest.mark.parametrize("other", [{"system": "Terse."}, {"raw": True}, {"text": "A"}])
def test_what_differs_in_anything_is_another_version(store, other) -> None:
    save(store, "a")
    made = save(store, **({"text": "a"} | other))
    assert made.version == 2
    (_, found) = store.versions("/p", "sum")
    assert found == made


def test_a_number_is_never_used_twice(store) -> None:
    for text in ("a", "b"):
        save(store, text)
    assert store.remove("/p", "sum", 2) == 1
    assert [each.version for each in store.versions("/p", "sum")] == [1]
    assert save(store, "b").version == 3
    assert store.remove("/p", "sum") == 2
    assert (store.versions("/p", "sum"), store.all("/p")) == ([], [])
    assert save(store, "a").version == 4


def test_projects_are_apart(store) -> None:
    save(store, "a", project="/p")
    save(store, "b", project="/q")
    assert [each.text for each in store.all("/p")] == ["a"]
    assert [each.text for each in store.all("/q")] == ["b"]


def test_a_text_is_kept_as_it_is(store) -> None:
    odd = "  {{ x }}\r\n\0 'quoted' \u202e 🙂\n"
    save(store, odd, system="")
    assert store.versions("/p", "sum")[0].text == odd


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_stands_beside_the_ledger_and_is_its_owners_alone(tmp_path) -> None:
    store = open_prompts(url_of(tmp_path))
    save(store, "a")
    path = prompts_path(url_of(tmp_path))
    assert (store.location, path.name) == (str(path), "l.prompts.sqlite3")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()
    again = open_prompts(url_of(tmp_path))
    assert [each.text for each in again.versions("/p", "sum")] == ["a"]
    again.close()


def test_in_memory_there_is_no_file() -> None:
    assert (prompts_path("memory"), open_prompts("memory").location) == (None, "memory")


def test_a_file_of_something_else_is_left_alone(tmp_path) -> None:
    path = prompts_path(url_of(tmp_path))
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="is not a store of prompts of llmkit"):
        open_prompts(url_of(tmp_path))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM mine").fetchone() == (0,)


def test_a_damaged_file_is_an_error_and_stays_where_it_is(tmp_path) -> None:
    path = prompts_path(url_of(tmp_path))
    path.write_bytes(b"not a database at all, but somebody's work" * 100)
    with pytest.raises(StoreError):
        open_prompts(url_of(tmp_path))
    assert path.read_bytes().startswith(b"not a database")


def test_a_newer_schema_is_refused(tmp_path) -> None:
    path = prompts_path(url_of(tmp_path))
    steps = [*MIGRATIONS, ("CREATE TABLE more (x)",)]
    Database(path, migrations=steps, application_id=APPLICATION_ID, what="prompts").close()
    with pytest.raises(StoreError, match="newer llmkit"):
        open_prompts(url_of(tmp_path))


def _save_many(url, who, start):
    store = open_prompts(url)
    start.wait()
    for number in range(20):
        save(store, f"{who} {number}")
    store.close()


def test_two_kernels_at_once_lose_nothing_and_share_the_numbers(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    kernels = [context.Process(target=_save_many, args=(url_of(tmp_path), who, start)) for who in "ab"]
    for kernel in kernels:
        kernel.start()
    start.set()
    for kernel in kernels:
        kernel.join(60)
    assert [kernel.exitcode for kernel in kernels] == [0, 0]
    found = open_prompts(url_of(tmp_path)).versions("/p", "sum")
    assert [each.version for each in found] == list(range(1, 41))
    assert {each.text for each in found} == {f"{who} {number}" for who in "ab" for number in range(20)}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_what_was_kept_outlives_a_killed_process(tmp_path) -> None:
    code = f"""
        import sys
        from llmkit.state.prompts import open_prompts
        open_prompts({url_of(tmp_path)!r}).save("/p", "sum", "kept", system=None, raw=False, now=1.0)
        print("saved", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"saved\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert [each.text for each in open_prompts(url_of(tmp_path)).versions("/p", "sum")] == ["kept"]
