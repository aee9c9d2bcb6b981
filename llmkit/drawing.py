"""Objects of a notebook as pictures: what their own library makes of them. No library is loaded for it but Pillow."""

from __future__ import annotations

import sys
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError
from llmkit.redaction import tidy

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["drawn"]

_STEP = "a picture is a path, a URL, bytes, a PIL image, a matplotlib figure, or what shows itself as PNG or JPEG"


def drawn(value: Any) -> bytes | str:
    """``value`` as the bytes of a PNG or JPEG; as text where it gives base64 or a URL.

    Raises:
        ConfigError: it is nothing that can be seen.
    """
    try:
        shown = _drawn(value)
    except ConfigError:
        raise
    except Exception as error:  # another library's, or the user's own
        what = tidy(f"{type(error).__name__}: {error}", limit=200)
        raise ConfigError(f"{type(value).__name__} could not be drawn: {what}") from error
    if shown:
        return shown
    if callable(getattr(value, "_repr_svg_", None)):
        raise ConfigError(f"{type(value).__name__} shows itself as SVG alone, and models read pixels", next_step=_STEP)
    raise ConfigError(f"{type(value).__name__} is no picture", next_step=_STEP)


def _drawn(value: Any) -> bytes | str | None:
    for module, name, draw in _WAYS:
        if _is_of(value, module, name):
            return draw(value)
    for name in ("_repr_png_", "_repr_jpeg_"):
        show = getattr(value, name, None)
        shown = show() if callable(show) and not isinstance(value, type) else None
        if isinstance(shown, tuple) and shown:  # with metadata
            shown = shown[0]
        if isinstance(shown, bytes | str) and shown:
            return shown
    return None


def _is_of(value: Any, module: str, name: str) -> bool:
    """Whether ``value`` is of that class, whose module is not loaded for the question."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _saved(image: Any) -> bytes:
    out = BytesIO()
    if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}:
        image = image.convert("RGB")
    image.save(out, format="PNG")
    return out.getvalue()


def _of_figure(figure: Any) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight")
    return out.getvalue()


def _of_array(array: Any) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        step = "pip install pillow; or save it as PNG, and give the path"
        raise ConfigError("an array becomes a picture by way of Pillow, which is not here", next_step=step) from None
    kind, shape = array.dtype.kind, " × ".join(map(str, array.shape))
    if array.ndim not in {2, 3} or (array.ndim == 3 and array.shape[2] not in {1, 3, 4}) or not array.size:
        step = "it is height × width, or height × width × 3 (RGB) or 4 (RGBA)"
        raise ConfigError(f"an array of {shape} is no picture", next_step=step)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if kind == "f" and array.min() >= 0 and array.max() <= 1:
        array = (array * 255).round().astype("uint8")
    elif kind == "b":
        array = array.astype("uint8") * 255
    elif kind not in {"i", "u"} or array.min() < 0 or array.max() > 255:
        step = "whole numbers from 0 to 255, or fractions from 0 to 1"
        raise ConfigError(f"an array of {array.dtype} outside what a picture has", next_step=step)
    return _saved(Image.fromarray(array.astype("uint8")))


_WAYS: tuple[tuple[str, str, Callable[[Any], bytes | str | None]], ...] = (
    ("numpy", "ndarray", _of_array),
    ("PIL.Image", "Image", _saved),
    ("matplotlib.figure", "FigureBase", _of_figure),
    ("matplotlib.axes", "Axes", lambda axes: _of_figure(axes.get_figure())),
    ("IPython.display", "Image", lambda image: image.data or image.url),
)
