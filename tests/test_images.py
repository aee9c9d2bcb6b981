"""Pictures: what their bytes say, wherever they come from, and what is refused before anything is sent."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit import images
from llmkit.call import Message
from llmkit.errors import ConfigError
from llmkit.images import Format, Picture, illustrated, size_in
from tests.pictures import gif, jpeg, png, png_url, webp

KEY = "sk-proj-0123456789abcdefghij"  # no key of anything


def refusal(value) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Picture.of(value)
    return caught.value


# -- what the bytes say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (16_383, 7)])
@pytest.mark.parametrize(
    "make, media_type",
    [
        (png, "image/png"),
        (gif, "image/gif"),
        (jpeg, "image/jpeg"),
        (webp, "image/webp"),
        (lambda w, h: webp(w, h, "VP8 "), "image/webp"),
        (lambda w, h: webp(w, h, "VP8L"), "image/webp"),
    ],
)
def test_format_and_size_are_read_from_the_first_bytes(make, media_type, size) -> None:
    data = make(*size)
    picture = Picture.of(data)
    assert picture.format == Format(media_type, *size)
    assert picture.size == len(data)
    assert picture.url == f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    assert size_in(picture.part) == size


@pytest.mark.parametrize(
    "kind, mode", [("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGBA")]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True}])
def test_files_of_another_library_are_read_as_it_reads_them(kind, mode, options) -> None:
    pil = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    pil.effect_noise((301, 77), 50).convert(mode).save(out, kind, **options)
    picture = Picture.of(out.getvalue())
    assert picture.format == Format(f"image/{kind.lower()}", 301, 77)


def test_a_name_that_lies_is_not_believed(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(jpeg(5, 6))
    assert Picture.of(path).format == Format("image/jpeg", 5, 6)
    claimed = f"data:image/png;base64,{base64.b64encode(gif(5, 6)).decode()}"
    assert Picture.of(claimed).url.startswith("data:image/gif;")


@pytest.mark.parametrize("before", [0, 10_000, 300_000])
def test_the_size_of_a_jpeg_is_found_behind_what_an_application_put_there(before) -> None:
    picture = Picture.of(jpeg(700, 500, before=b"\xff\xc0" * (before // 2)))
    assert picture.format == Format("image/jpeg", 700, 500)
    assert size_in(picture.part) == (700, 500)


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "is empty"),
        (b"hello", "is no picture; models take PNG, JPEG, GIF or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        (b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg>", "is SVG"),
        (b"BM" + b"\0" * 60, "is BMP"),
        (b"II*\0" + b"\0" * 60, "is TIFF"),
        (b"\0\0\0\x1cftypavif" + b"\0" * 60, "is AVIF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 60, "is HEIC"),
        (b"%PDF-1.7", "is PDF"),
        (png()[:20], "it is broken"),
        (png(0, 5), "it is broken"),
        (gif()[:8], "it is broken"),
        (jpeg()[:12], "it is broken"),
        (b"\xff\xd8\xff\xd9", "it is broken"),
        (webp()[:25], "it is broken"),
    ],
)
def test_what_no_model_takes_is_named(data, says) -> None:
    assert says in refusal(data).message


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"]),
)
def test_no_bytes_do_harm(data, head) -> None:
    with contextlib.suppress(ConfigError):
        assert Picture.of(head + data).format is not None
    size_in(
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(head + data).decode()}}
    )


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda x: st.dictionaries(st.sampled_from(["image_url", "source", "url", "data", "type"]), x),
    )
)
def test_no_part_does_harm(part) -> None:
    found = size_in(part)
    assert found is None or min(found) > 0


# -- where they come from ----------------------------------------------------------------------------------------------


def test_paths_bytes_files_and_data_urls_are_the_same_picture(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(png())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    same = [
        path,
        str(path),
        "a b.png",
        "~/a b.png",
        png(),
        bytearray(png()),
        memoryview(png()),
        io.BytesIO(png()),
        png_url(),
    ]
    with path.open("rb") as file:
        assert {Picture.of(value) for value in (*same, file)} == {Picture.of(png())}


def test_an_address_on_the_web_is_passed_on_and_never_fetched() -> None:
    picture = Picture.of("https://example.test/a.png?x=%C3%A4")
    assert picture.part == {"type": "image_url", "image_url": {"url": "https://example.test/a.png?x=%C3%A4"}}
    assert (picture.format, picture.size, size_in(picture.part)) == (None, None, None)


@pytest.mark.parametrize(
    "value, says",
    [
        ("file:///etc/passwd", "begins with https:, http: or data:"),
        ("ftp://host/a.png", "begins with https:, http: or data:"),
        ("https://ana:geheim@host/a.png", "a name or a password"),
        ("https:///a.png", "names no host"),
        ("https://host/a b.png", "is no URL"),
        ("https://host/ä.png", "is no URL"),
        ("https://host/" + "a" * 9_000, "is no URL"),
        ("data:image/png,abc", "is no picture"),
        ("data:image/png;base64,!!!", "is no base64"),
        ("data:image/png;base64,QUJD", "is no picture"),
        ("nowhere.png", "there is no file 'nowhere.png'"),
        ("a\0b", "there is no file"),
        (os.sep, "is no file"),
        (io.StringIO("text"), "open as text"),
        (3, "int is no picture"),
        (object(), "object is no picture"),
        (Picture, "type is no picture"),
    ],
)
def test_what_is_no_picture_is_named(value, says) -> None:
    error = refusal(value)
    assert says in error.message
    assert "geheim" not in error.message
    assert len(error.message) < 300


def test_a_picture_may_not_be_too_large(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", 1_000)
    large = png() + b"\0" * 1_000
    path = tmp_path / "large.png"
    path.write_bytes(large)
    for value in (large, path, io.BytesIO(large), "data:image/png;base64," + "A" * 20_000):
        assert "MB" in refusal(value).message
    monkeypatch.setattr(images, "MOST_BYTES_IN_ALL", 2_000)
    fits = png() + b"\0" * 800
    assert len(Picture.all_of([fits, fits])) == 2
    with pytest.raises(ConfigError, match="in all"):
        Picture.all_of([fits, fits, fits])


def test_a_call_may_not_have_too_many() -> None:
    with pytest.raises(ConfigError, match="101 pictures are more than the 100"):
        Picture.all_of([png()] * 101)
    assert Picture.all_of(png()) == Picture.all_of([Picture.of(png())])


class Shows:
    def __init__(self, png=None, jpeg=None) -> None:
        self._png, self._jpeg = png, jpeg

    def _repr_png_(self):
        return self._png

    def _repr_jpeg_(self):
        return self._jpeg


def test_objects_that_show_themselves_are_pictures() -> None:
    encoded = base64.b64encode(png()).decode()
    for shown in (png(), encoded, encoded + "\n", (encoded, {"width": 2})):
        assert Picture.of(Shows(shown)) == Picture.of(png())
    assert Picture.of(Shows(None, jpeg())).format == Format("image/jpeg", 2, 3)
    assert "Shows is no picture" in refusal(Shows()).message
    assert "the Shows is no base64" in refusal(Shows("ä")).message


def test_an_object_that_fails_to_show_itself_is_ours() -> None:
    class Fails:
        def _repr_png_(self):
            raise RuntimeError("no display")

    class Vector:
        def _repr_svg_(self):
            return "<svg/>"

    assert refusal(Fails()).message == "Fails could not be drawn: RuntimeError: no display"
    assert "shows itself as SVG alone" in refusal(Vector()).message


def test_images_of_ipython(tmp_path) -> None:
    display = pytest.importorskip("IPython.display")
    assert Picture.of(display.Image(data=png())) == Picture.of(png())
    assert Picture.of(display.Image(data=gif(), format="gif")).format == Format("image/gif", 2, 3)
    (tmp_path / "a.png").write_bytes(png())
    assert Picture.of(display.Image(filename=tmp_path / "a.png")) == Picture.of(png())
    assert Picture.of(display.Image(url="https://x.test/a.png")) == Picture.of("https://x.test/a.png")


def test_images_of_pillow() -> None:
    pil = pytest.importorskip("PIL.Image")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F"):
        assert Picture.of(pil.new(mode, (7, 5))).format == Format("image/png", 7, 5)


def test_figures_of_matplotlib_are_drawn_the_same_each_time() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(figsize=(2, 1))
    axes = figure.subplots()
    axes.plot([1, 2, 3])
    picture = Picture.of(figure)
    assert picture.format is not None
    assert picture.format.media_type == "image/png"
    assert picture == Picture.of(figure) == Picture.of(axes)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7), "uint8"),
        np.ones((5, 7, 3)),
        np.full((5, 7, 4), 255),
        np.zeros((5, 7, 1), "float32"),
        np.eye(5, 7, dtype=bool),
    ],
)
def test_arrays_are_pictures(array) -> None:
    pytest.importorskip("PIL")
    assert Picture.of(array).format == Format("image/png", 7, 5)


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros(7), "an array of 7 is no picture"),
        (np.zeros((5, 7, 2)), "an array of 5 × 7 × 2 is no picture"),
        (np.zeros((0, 7)), "is no picture"),
        (np.full((5, 7), 1.5), "outside what a picture has"),
        (np.full((5, 7), np.nan), "outside what a picture has"),
        (np.full((5, 7), 256), "outside what a picture has"),
        (np.full((5, 7), -1), "outside what a picture has"),
        (np.full((5, 7), "x"), "outside what a picture has"),
    ],
)
def test_other_arrays_are_none(array, says) -> None:
    pytest.importorskip("PIL")
    assert says in refusal(array).message


def test_an_array_without_pillow_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "pip install pillow" in refusal(np.zeros((5, 7))).next_step


# -- in a message ------------------------------------------------------------------------------------------------------


def test_pictures_stand_before_the_text_of_the_last_message_of_the_user() -> None:
    one, two = Picture.of(png()), Picture.of("https://x.test/a.png")
    messages = (Message("system", "s"), Message("user", "first"), Message("user", "second"), Message("assistant", "a"))
    told = illustrated(messages, [one, two])
    assert [*told[:2], told[3]] == [*messages[:2], messages[3]]
    assert told[2].content == [one.part, two.part, {"type": "text", "text": "second"}]
    assert told[2].text == "second"
    assert illustrated([told[2]], [one])[0].content == [one.part, *told[2].content]
    with pytest.raises(ConfigError, match="a message of the user"):
        illustrated([Message("assistant", "a")], [one])


def test_nothing_shows_the_data_of_a_picture() -> None:
    picture = Picture.of(png(640, 480))
    (message,) = illustrated([Message("user", "What is it? " + "x" * 5_000)], [picture])
    for shown in (repr(picture), str(picture), repr(message), repr([message])):
        assert "base64" not in shown
        assert len(shown) < 400
    assert repr(picture) == f"<Picture PNG, 640 × 480, {len(png(640, 480)) / 1000:.1f} kB>"
    assert repr(message).startswith("Message('user', [<image_url>, 'What is it? xxx")
    assert KEY not in repr(Picture.of(f"https://x.test/a.png?key={KEY}"))


def test_a_message_shows_any_content() -> None:
    assert repr(Message("user", "hi")) == "Message('user', 'hi')"
    odd: list = [{"type": "text", "text": 3}, {"type": 7}, {}, "text", None]
    assert repr(Message("user", odd)) == "Message('user', [<text>, <7>, <dict>, <str>, <NoneType>])"


def test_paths_may_be_any_path_like() -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        Picture.of(Path("no/such.png"))
