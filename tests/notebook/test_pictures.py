"""``--image``: what is looked at first, and what goes out."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest

from llmkit.errors import ConfigError, InvalidRequest, LLMKitError
from llmkit.images import Picture
from llmkit.notebook.pictures import pictures
from tests.notebook.server import refused
from tests.notebook.test_magics import run
from tests.pictures import gif, png, png_url


class Page:
    def __init__(self) -> None:
        self.photo = png(4, 4)
        self.visits = 0

    @property
    def drawn(self):
        self.visits += 1
        return png(5, 5)


def sizes(*expressions, **names):
    return [picture.format[1:] for picture in pictures(expressions, names)]


def failure(expression, **names) -> str:
    with pytest.raises(ConfigError) as caught:
        pictures([expression], names)
    return str(caught.value.message)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plot.png").write_bytes(png(1, 1))
    (tmp_path / "plot").write_bytes(png(2, 2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a b.png").write_bytes(png(3, 3))
    return tmp_path


def test_the_notebook_comes_first_then_the_files(files) -> None:
    assert sizes("plot", "plot.png", "data/a b.png", "./plot", str(files / "plot")) == [
        (2, 2),
        (1, 1),
        (3, 3),
        (2, 2),
        (2, 2),
    ]
    assert sizes("plot", "./plot", plot=png(9, 9)) == [(9, 9), (2, 2)]
    assert sizes("plot.png", plot=object()) == [(1, 1)]  # the variable has no .png


def test_what_is_in_a_variable_is_found(files) -> None:
    page = Page()
    names = {"page": page, "all": [png(6, 6)], "by": {"a b": gif(7, 7)}, "i": 0}
    assert sizes("page.photo", "page.drawn", "all[0]", "all[i]", "by['a b']", **names) == [
        (4, 4),
        (5, 5),
        (6, 6),
        (6, 6),
        (7, 7),
    ]
    assert page.visits == 1


def test_a_variable_may_hold_a_path_or_a_url(files) -> None:
    assert sizes("p", "q", "u", p=files / "plot", q="data/a b.png", u=png_url(8, 8)) == [(2, 2), (3, 3), (8, 8)]
    (picture,) = pictures(["u"], {"u": "https://x.test/a.png"})
    assert picture == Picture.of("https://x.test/a.png")


def test_a_call_is_the_users_own_code() -> None:
    assert sizes("draw(3)", draw=lambda size: png(size, size)) == [(3, 3)]
    assert "no ink" in failure("draw()", draw=lambda: {}["no ink"])


def test_nothing_else_is_run(files) -> None:
    def never(*_):
        raise AssertionError

    class Divides:
        __truediv__ = __add__ = never

    for expression in ("data/plot", "data+plot", "[data]", "data if plot else data", "lambda: data", "(plot := data)"):
        assert "there is no such variable" in failure(expression, data=Divides(), plot=Divides())
    assert "there is no such variable" in failure("__import__('os').getcwd()")
    assert "there is no such variable" in failure("open('plot')")


def test_later_namespaces_win() -> None:
    (picture,) = pictures(["x"], {"x": png(1, 1)}, {"x": png(2, 2)})
    assert picture.format[1:] == (2, 2)


def test_an_error_says_what_was_tried(files) -> None:
    message = failure("plto.png", plot=1)
    assert (
        message == f"--image plto.png: there is no such variable, and no such file in {files}; did you mean plot.png?"
    )
    assert "did you mean figure?" in failure("figrue", figure=png())
    assert failure("number", number=3).startswith("--image number: int is no picture")
    assert "data is no file" in failure("data").replace("'", "")
    assert "there is no such variable" in failure("by['x']", by={})
    assert len(failure("x" * 5_000)) < 500
    assert "\x1b" not in failure("a\x1b[31mb")


# -- in a cell ---------------------------------------------------------------------------------------------------------


def test_a_cell_sends_its_pictures_before_its_text(shell, server, folder) -> None:
    (folder / "a.png").write_bytes(png(640, 480))
    shell.user_ns["fig"] = gif()
    run(shell, "%%llm a << --image a.png --image fig --image https://x.test/b.png\nWhat is it?")
    (message,) = server.requests[0]["messages"]
    *parts, text = message["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert [part["image_url"]["url"] for part in parts] == [
        png_url(640, 480),
        Picture.of(gif()).url,
        "https://x.test/b.png",
    ]
    assert shell.user_ns["a"].text == "Hello there."


def test_another_picture_is_another_question(shell, server, folder) -> None:
    for number, name in enumerate(("a", "b", "a")):
        (folder / "a.png").write_bytes(png(5, 5 + (name == "b")))
        run(shell, f"%%llm r{number} << --image a.png\nWhat is it?")
    assert [shell.user_ns[f"r{number}"].source for number in range(3)] == ["provider", "provider", "cache"]
    assert len(server.requests) == 2


def test_what_is_no_picture_is_said_before_anything_is_sent(shell, server, folder) -> None:
    (folder / "a.svg").write_text("<svg/>", "utf-8")
    for name in ("nowhere.png", "a.svg", "shell_", "file:///etc/passwd"):
        error = run(shell, f"%%llm --image {name}\nWhat is it?").error
        assert isinstance(error, ConfigError)
        assert error.block().count("\n") == 1
    assert server.requests == []


def test_a_model_that_cannot_see_says_so(shell, server) -> None:
    server.next(refused(400, "tiny is not a multimodal model"))
    shell.user_ns["picture"] = png()
    error = run(shell, "%%llm --image picture\nWhat is it?").error
    assert isinstance(error, InvalidRequest)
    assert "tiny is not a multimodal model" in error.block()
    assert "base64" not in error.block()


def test_a_cap_reckons_with_the_picture(shell, server) -> None:
    shell.user_ns["picture"] = png()
    error = run(shell, "%%llm --image picture --max-cost 0.01\nWhat is it?").error
    assert isinstance(error, LLMKitError)
    assert "for 50159 tokens in" in error.block()
    assert server.requests == []
    assert run(shell, "%%llm --max-cost 0.01\nWhat is it?").error is None


def test_a_chat_remembers_its_pictures(shell, server) -> None:
    shell.user_ns["picture"] = png()
    run(shell, "%%llm --chat trip --image picture\nWhat is it?")
    run(shell, "%%llm --chat trip\nAnd what is behind it?")
    first, _, last = server.requests[1]["messages"]
    assert first["content"] == [Picture.of(png()).part, {"type": "text", "text": "What is it?"}]
    assert last == {"role": "user", "content": "And what is behind it?"}


def test_samples_and_plans_see_them_too(shell, server) -> None:
    shell.user_ns["picture"] = png()
    shown = run(shell, "%%llm --plan --image picture\nWhat is it?")
    assert (shown.error, server.requests) == (None, [])
    assert "50,1" in shown.stdout + "".join(
        str(output.data) for output in shown.outputs
    )  # of unknown rules: the largest
    run(shell, "%%llm --repeat 2 --image picture\nWhat is it?")
    assert [len(each["messages"][0]["content"]) for each in server.requests] == [2, 2]


def test_no_file_of_a_session_holds_a_picture(shell, folder, server) -> None:
    data = png(64, 64) + bytes(range(256)) * 20
    shell.user_ns["picture"] = data
    run(shell, "%llm record calls.jsonl")
    for line in ("--image picture", "--chat trip --image picture", "--chat trip --image picture --save seen"):
        assert run(shell, f"%%llm {line}\nWhat is it? {line}").error is None
    run(shell, "%llm live")
    run(shell, "%unload_ext llmkit")
    assert len(server.requests) == 3
    books = [path for at in (folder, Path(os.environ["LLMKIT_DATA_DIR"])) for path in at.rglob("*") if path.is_file()]
    assert {path.name for path in books} >= {"calls.jsonl", "ledger.sqlite3"}
    needle = base64.b64encode(data)[600:660]
    assert [path for path in books if needle in (held := path.read_bytes()) or data[600:640] in held] == []


def test_an_open_file_is_the_same_picture_in_each_run() -> None:
    written = io.BytesIO()
    written.write(png(6, 7))  # as savefig leaves it: at its end
    for _ in range(2):
        assert sizes("written", written=written) == [(6, 7)]
    assert written.tell() == len(written.getvalue())
    written.close()
    assert "cannot be read" in failure("written", written=written)


def test_a_list_is_all_of_its_pictures() -> None:
    pages = [png(1, 1), png(2, 2)]
    assert sizes("pages", "pages[0]", pages=pages) == [(1, 1), (2, 2), (1, 1)]
    assert "the list is empty" in failure("pages", pages=[])


def test_quotes_that_the_line_takes_away_are_named() -> None:
    with pytest.raises(ConfigError, match="NameError") as caught:
        pictures(["pages[first]"], {"pages": {"first": png(1, 1)}})
    assert caught.value.next_step == "quotes inside need quotes around: --image \"pages['first']\""


def test_a_scheme_in_capitals_is_sent_as_services_take_it() -> None:
    assert [picture.url for picture in pictures(["HTTPS://Example.com/A.png"], {})] == ["https://Example.com/A.png"]
