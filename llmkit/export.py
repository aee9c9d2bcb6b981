"""The ledger as a file: every call with its attempts, as CSV, as lines of JSON, or as Parquet.

It is written page by page, beside its place and put there when it is whole, readable by its owner alone. So memory stays
small, a full disk leaves no half of a file, and one that was there is kept unless it was asked to be replaced.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from llmkit.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["FORMATS", "export"]

FORMATS = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]

# The fields of a call and of an attempt, in their order, and what they are in Parquet.
_TEXT, _COUNT, _SECONDS, _USD, _FLAG, _TIME, _TAGS = "string", "int64", "float64", "usd", "bool", "time", "tags"
_TOKENS = dict.fromkeys(
    ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens"), _COUNT
)
CALL = {
    "request_id": _TEXT,
    "started": _TIME,
    "user": _TEXT,
    "tags": _TAGS,
    "model": _TEXT,
    "template": _TEXT,
    "response_model": _TEXT,
    "provider": _TEXT,
    "status": _TEXT,
    "source": _TEXT,
    **_TOKENS,
    "estimated": _FLAG,
    "cost_usd": _USD,
    "saved_usd": _USD,
    "latency_s": _SECONDS,
    "time_to_first_token_s": _SECONDS,
    "retries": _COUNT,
    "finish_reason": _TEXT,
    "error": _TEXT,
    "message": _TEXT,
}
ATTEMPT = {
    "number": _COUNT,
    "started": _TIME,
    "provider": _TEXT,
    "model": _TEXT,
    "base_url": _TEXT,
    "status": _TEXT,
    **_TOKENS,
    "estimated": _FLAG,
    "cost_usd": _USD,
    "price_source": _TEXT,
    "price": _TEXT,
    "price_date": _TEXT,
    "latency_s": _SECONDS,
    "time_to_first_token_s": _SECONDS,
    "http_status": _COUNT,
    "provider_request_id": _TEXT,
    "finish_reason": _TEXT,
    "maybe_billed": _FLAG,
    "error": _TEXT,
    "message": _TEXT,
}

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001 - some spreadsheets take the wide ones as well


def export(
    pages: Iterable[Sequence[tuple[Row, Sequence[Row]]]], path: str | os.PathLike[str], *, overwrite: bool = False
) -> int:
    """Write all calls of ``pages``, each with its attempts, to ``path``, whose ending says how. Returns how many calls.

    * ``.csv``: a line an attempt, with what is known of its call first; a call without attempts is a line as well. Sum
      ``attempt_cost_usd``, since the call's own cost stands in each of its lines. A cell that a spreadsheet would take
      for a formula begins with an apostrophe.
    * ``.jsonl``: a line a call, with a list of its ``attempts``.
    * ``.parquet``: the same, typed; needs pyarrow.

    Raises:
        ConfigError: another ending, a file that is there already, a folder that is not, pyarrow missing.
        StoreError: it cannot be written, or the ledger cannot be read; nothing is left at ``path``.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"a ledger is exported as {', '.join(FORMATS)}, not as {target.name!r:.80}")
    if os.path.lexists(target) and not overwrite:
        raise _is_there(target)
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}", next_step="make it, or choose another one")
    writer = _WRITERS[target.suffix.lower()]
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)  # 0600
        try:
            with os.fdopen(handle, "wb") as file:
                calls = _written(writer(file), pages)
                file.flush()
                os.fsync(handle)
            _put(name, target, overwrite=overwrite)
        finally:
            with suppress(OSError):
                os.unlink(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{target} cannot be written: {reason}", next_step="choose another place") from error
    return calls


def _written(writer: _Writer, pages: Iterable[Sequence[tuple[Row, Sequence[Row]]]]) -> int:
    calls = 0
    for page in pages:
        writer.write(page)
        calls += len(page)
    writer.close()
    return calls


def _put(name: str, target: Path, *, overwrite: bool) -> None:
    """Give the finished file its name; without ``overwrite`` never over one that has come there meanwhile."""
    if overwrite:
        os.replace(name, target)
        return
    try:
        os.link(name, target)
    except FileExistsError:
        raise _is_there(target) from None
    except OSError:  # a drive without hard links
        if os.path.lexists(target):
            raise _is_there(target) from None
        os.rename(name, target)


def _is_there(target: Path) -> ConfigError:
    return ConfigError(
        f"{target} is there already, and is not written over unasked",
        next_step="choose another name, or say overwrite=True (--overwrite in a command)",
    )


# -- formats -----------------------------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, page: Sequence[tuple[Row, Sequence[Row]]]) -> None: ...

    def close(self) -> None: ...


class _Text:
    """What is written as UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def put(self, text: str) -> int:
        return self._file.write(text.encode("utf-8", "replace"))

    # The csv module calls what it writes to by this name.
    write: Any = put

    def close(self) -> None:
        """Whoever opened the file closes it."""


class _Csv:
    def __init__(self, file: IO[bytes]) -> None:
        self._lines = csv.writer(_Text(file))
        self._lines.writerow([*CALL, *(f"attempt_{name}" for name in ATTEMPT)])

    def write(self, page: Sequence[tuple[Row, Sequence[Row]]]) -> None:
        for call, attempts in page:
            begin = [_cell(_plain(call, name, kind)) for name, kind in CALL.items()]
            for attempt in attempts or ({},):
                self._lines.writerow([*begin, *(_cell(_plain(attempt, n, k)) for n, k in ATTEMPT.items())])

    def close(self) -> None:
        pass


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (value.lstrip().startswith(_FORMULA) or value[:1] in {"\t", "\r", "\n"}):
        return f"'{value}"
    return value


class _Jsonl:
    def __init__(self, file: IO[bytes]) -> None:
        self._put = _Text(file).put

    def write(self, page: Sequence[tuple[Row, Sequence[Row]]]) -> None:
        for call, attempts in page:
            line = {name: _plain(call, name, kind) for name, kind in CALL.items()}
            line["attempts"] = [{n: _plain(attempt, n, k) for n, k in ATTEMPT.items()} for attempt in attempts]
            self._put(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


def _plain(row: Mapping[str, Any], name: str, kind: str) -> Any:
    """A value as text formats have it. USD are floats, whose shortest text is exact to the nano-dollar up to millions."""
    value = row.get(name)
    if value is None:
        return None
    if kind == _USD:
        return float(value)
    return datetime.fromtimestamp(value, UTC).isoformat(timespec="microseconds") if kind == _TIME else value


class _Parquet:
    def __init__(self, file: IO[bytes]) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise ConfigError("Parquet needs pyarrow", next_step="pip install pyarrow, or export as .jsonl") from None
        kinds: dict[str, Any] = {
            _TEXT: pa.string(),
            _COUNT: pa.int64(),
            _SECONDS: pa.float64(),
            _USD: pa.decimal128(38, 9),
            _FLAG: pa.bool_(),
            _TIME: pa.timestamp("us", tz="UTC"),
            _TAGS: pa.map_(pa.string(), pa.string()),
        }
        attempt = pa.struct([(name, kinds[kind]) for name, kind in ATTEMPT.items()])
        self._schema = pa.schema([*((n, kinds[k]) for n, k in CALL.items()), ("attempts", pa.list_(attempt))])
        self._table: Callable[..., Any] = pa.Table.from_pylist
        self._writer = parquet.ParquetWriter(file, self._schema)

    def write(self, page: Sequence[tuple[Row, Sequence[Row]]]) -> None:
        lines = []
        for call, attempts in page:
            line = {name: _exact(call, name, kind) for name, kind in CALL.items()}
            line["attempts"] = [{n: _exact(attempt, n, k) for n, k in ATTEMPT.items()} for attempt in attempts]
            lines.append(line)
        self._writer.write_table(self._table(lines, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _exact(row: Mapping[str, Any], name: str, kind: str) -> Any:
    value = row.get(name)
    if value is None:
        return None
    if kind == _TAGS:
        return list(value.items())
    return round(value * 1_000_000) if kind == _TIME else value


_WRITERS: dict[str, Callable[[IO[bytes]], _Writer]] = {".csv": _Csv, ".jsonl": _Jsonl, ".parquet": _Parquet}
