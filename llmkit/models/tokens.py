"""How many tokens a text is: counted offline where the encoding is known, estimated and marked so where it is not.

Two kinds of number come from here, and they are never to be confused:

- `count_text` and `count_messages` say how many tokens it most likely is. `Count.exact` tells a count from an estimate.
- `upper_bound` says how many it cannot exceed, at once and without loading anything. Budgets hold against it.

The rank files of OpenAI's encodings come with the package (``data/``, MIT-licensed data of tiktoken) and are unpacked
at the first count that needs them: 0.2 s for ``cl100k_base``, 0.5 s for ``o200k_base``, once a process. No count ever
raises, whatever the text, and none touches the network.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.images import size_in
from llmkit.lock import new_lock
from llmkit.models import pictures
from llmkit.models.windows import is_reasoning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import tiktoken

    from llmkit.call import Message
    from llmkit.endpoint import Endpoint
    from llmkit.reply import Usage

__all__ = [
    "Count",
    "count",
    "count_input",
    "count_messages",
    "count_text",
    "counted",
    "encoding_for",
    "estimate",
    "is_loaded",
    "load",
    "safe_count",
    "simulated_tokens",
    "unmeasured",
    "upper_bound",
]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# What OpenAI documents for its chat format: each message is wrapped in this many tokens, and the reply is primed by so many.
TOKENS_PER_MESSAGE = 3
PRIMING_TOKENS = 3

# What a chat template may add, in the upper bound: Llama's and Qwen's wrap a message in 5 or 6 tokens and may put a
# default system prompt of about 30 before all; gpt-oss's is near 100.
MOST_TOKENS_PER_MESSAGE = 16
MOST_PRIMING_TOKENS = 128

# The same where the encoding is known, so that the chat format is OpenAI's: the documented numbers, doubled.
_SAFE_TOKENS_PER_MESSAGE = 8
_SAFE_PRIMING_TOKENS = 16

# Most tokens of one picture of unknown size: gpt-4o-mini has the highest published number (2,833 and 5,667 for each of
# 8 tiles); vision models on vLLM stay below 16,384.
MOST_TOKENS_PER_IMAGE = 50_000

_PIECE = 50_000  # characters given to the encoder at a time: its regex overflows its stack on a long run of spaces
_QUICK = 20_000  # characters; counting more takes over a millisecond
_ESTIMATED = "estimated from the kinds of characters"
_MOST_COUNTED = 2_000_000  # characters; beyond that counting would take longer than the number is worth


@dataclass(frozen=True, slots=True)
class Count:
    """A number of tokens and how it was found.

    Attributes:
        exact: counted with the model's own encoding; False means an estimate.
        method: in a few words, for people.
    """

    tokens: int
    exact: bool
    method: str


def simulated_tokens(text: str) -> int:
    """Tokens of the simulator's own models: one for each word, the white space before it included."""
    return len(text.split())


# -- counting --------------------------------------------------------------------------------------------------------


def count_text(endpoint: Endpoint, text: str, *, wait: bool = True) -> Count:
    """Tokens of ``text`` as the model there reads it.

    Args:
        endpoint: whose model.
        text: any string; lone surrogates and control characters too.
        wait: load the encoding if it is not loaded yet (up to half a second); if False, estimate instead.
    """
    if endpoint.simulated:
        return Count(simulated_tokens(text), exact=True, method="words, as the simulator counts")
    name = encoding_for(endpoint.model)
    encoding = _encoding(name, wait=wait) if name and len(text) <= _MOST_COUNTED else None
    if encoding is None:
        return Count(estimate(text), exact=False, method=_ESTIMATED)
    try:
        tokens, whole = _encoded_length(encoding, text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - the encoder's own panic is no Exception
        log.warning("%s could not count a text of %d characters; it is estimated", name, len(text))
        return Count(estimate(text), exact=False, method=_ESTIMATED)
    return Count(tokens, exact=whole, method=f"{name}" if whole else f"{name}, in pieces")


def count_messages(endpoint: Endpoint, messages: Sequence[Message], *, wait: bool = True) -> Count:
    """Input tokens of a chat: its texts, and what OpenAI documents as put round them.

    Exact only for text under a known encoding, and not for reasoning models, whose hidden frame is not documented.
    Images count as in `upper_bound`. Arguments as in `count_text`.
    """
    counts = [count_text(endpoint, _text(message.content), wait=wait) for message in messages]
    total = sum(count.tokens for count in counts)
    if endpoint.simulated:
        return Count(total, exact=True, method="words, as the simulator counts")
    other = sum(_part_bound(part, endpoint.model) for message in messages for part in _other_parts(message.content))
    total += other + PRIMING_TOKENS + (TOKENS_PER_MESSAGE + 1) * len(messages)  # a role is one token
    inexact = next((count.method for count in counts if not count.exact), None)
    exact = inexact is None and not other and not is_reasoning(endpoint.model)
    return Count(
        total, exact, inexact or f"{encoding_for(endpoint.model)}, {TOKENS_PER_MESSAGE} tokens round a message"
    )


async def count(endpoint: Endpoint, text: str) -> Count:
    """`count_text` for the event loop: what takes long is done on a thread."""
    if len(text) <= _QUICK and is_loaded(endpoint):
        return count_text(endpoint, text)
    return await _threaded(count_text, endpoint, text)


async def count_input(endpoint: Endpoint, messages: Sequence[Message]) -> Count:
    """`count_messages` for the event loop: what takes long is done on a thread."""
    if is_loaded(endpoint) and _length(messages) <= _QUICK:
        return count_messages(endpoint, messages)
    return await _threaded(count_messages, endpoint, messages)


def unmeasured(endpoint: Endpoint, messages: Sequence[Message]) -> int:
    """How much of what `count_input` says stands for pictures that no rule is known for: a bound, and nothing near it."""
    parts = (part for message in messages for part in _other_parts(message.content))
    return sum(
        MOST_TOKENS_PER_IMAGE
        for part in parts
        if "image" in _kind(part) and pictures.bound(endpoint.model, size_in(part)) is None
    )


async def counted(
    endpoint: Endpoint, messages: Sequence[Message], text: str, reasoning: str = "", *, chunks: int = 0
) -> Usage:
    """The usage of an attempt whose provider did not report any, or not to its end. Always marked as estimated.

    ``chunks`` is how many pieces the answer came in. Each was a token or more, which an estimate must not fall below.
    """
    from llmkit.reply import Usage

    asked = await count_input(endpoint, messages)
    answer = await count(endpoint, text)
    thought = await count(endpoint, reasoning) if reasoning else None
    output = answer.tokens + (thought.tokens if thought else 0)
    return Usage(
        input_tokens=asked.tokens,
        output_tokens=output if answer.exact else max(output, chunks),
        reasoning_tokens=thought.tokens if thought else 0,
        estimated=True,
    )


async def safe_count(endpoint: Endpoint, messages: Sequence[Message], *, extra: Mapping[str, Any] | None = None) -> int:
    """Input tokens that will not be exceeded: as near as the encoding allows, `upper_bound` where it is unknown."""
    if not endpoint.simulated and encoding_for(endpoint.model) is None:
        return upper_bound(messages, model=endpoint.model, extra=extra)
    more = _json_size(extra) if extra else 0
    if is_loaded(endpoint) and _length(messages) <= _QUICK:
        return more + _safe_count(endpoint, messages)
    return more + await _threaded(_safe_count, endpoint, messages)


def _safe_count(endpoint: Endpoint, messages: Sequence[Message]) -> int:
    total = 0
    for message in messages:
        text = _text(message.content)
        count = count_text(endpoint, text)
        total += count.tokens if count.exact else _size(text)
        total += sum(_part_bound(part, endpoint.model) for part in _other_parts(message.content))
    if endpoint.simulated:
        return total
    return total + _SAFE_PRIMING_TOKENS + _SAFE_TOKENS_PER_MESSAGE * len(messages)


async def _threaded(work: Callable[..., _T], endpoint: Endpoint, what: object) -> _T:
    import asyncio

    try:
        return await asyncio.to_thread(work, endpoint, what)
    except RuntimeError:  # the loop is closing down and starts no more threads; a settlement still wants its number
        return work(endpoint, what)


def _length(messages: Sequence[Message]) -> int:
    return sum(len(message.content) if isinstance(message.content, str) else _QUICK + 1 for message in messages)


def upper_bound(messages: Sequence[Message], *, model: str = "", extra: Mapping[str, Any] | None = None) -> int:
    """Input tokens that no byte-level BPE can exceed, without loading an encoding.

    Text counts one token a UTF-8 byte; each message and the chat template a generous frame; an image what the rules of
    its model's family make of its size (`llmkit.models.pictures`), or 50,000 where none are known. Any other part counts the bytes of its JSON. What a
    part only points at (a file by its id or URL) cannot be bounded: 50,000 are added for it.

    Args:
        messages: what will be sent.
        model: narrows the bound of an image.
        extra: further fields of the request body, such as tools and schemas, which the model reads as well.
    """
    bound = MOST_PRIMING_TOKENS
    for message in messages:
        content = message.content
        bound += MOST_TOKENS_PER_MESSAGE + _size(message.role)
        if isinstance(content, str):
            bound += len(content) if content.isascii() else _size(content)
        else:
            bound += _size(_text(content)) + sum(_part_bound(part, model) for part in _other_parts(content))
    return bound + _json_size(extra) if extra else bound


def estimate(text: str) -> int:
    """A guess for unknown encodings, linear in the text, from what its UTF-8 bytes are.

    Weights fit what ``cl100k_base`` and ``o200k_base`` make of prose, code, JSON, tables and a dozen languages: within
    a third for most, low by half for random letters and digits. It is meant to be near, not safe: see `upper_bound`.
    """
    data = text.encode("utf-8", "surrogatepass")
    tokens = 0.0
    rest = len(data)
    for kind, weight in _WEIGHTS:
        left = data.translate(None, kind)
        tokens += (rest - len(left)) * weight
        data, rest = left, len(left)
        if not rest:
            break
    return round(tokens) or min(len(text), 1)


# Tokens a byte, by kind of byte. Of a character beyond ASCII only the first byte counts, for the whole of it.
_WEIGHTS = (
    (bytes(range(0x61, 0x7B)), 1 / 4.5),  # small letters: whole words are tokens
    (b" ", 0.03),  # nearly always part of the word that follows
    (bytes(range(0x41, 0x5B)), 0.4),  # capitals break words up
    (b"0123456789", 0.55),  # two or three a token
    (bytes([*range(0x21, 0x30), *range(0x3A, 0x41), *range(0x5B, 0x61), *range(0x7B, 0x7F)]), 0.8),  # marks
    (b"\n\t\r", 0.4),
    (bytes(range(0x80, 0xC0)), 0.0),  # the further bytes of a character
    (bytes(range(0xC2, 0xE0)), 0.6),  # Cyrillic, Greek, Arabic, accented Latin
    (bytes(range(0xE0, 0xF0)), 1.0),  # Chinese, Japanese, Korean, Indic
    (bytes(range(0xF0, 0xF5)), 2.5),  # emoji
    (bytes(range(0x80)), 1.0),  # control characters
)


_LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")


def _encoded_length(encoding: tiktoken.Encoding, text: str) -> tuple[int, bool]:
    """Tokens of ``text``, and whether every cut fell where the encoding itself cuts."""
    if len(text) <= _PIECE:
        return len(encoding.encode_ordinary(text)), True
    tokens, whole = 0, True
    for piece, clean in _pieces(text):
        tokens += len(encoding.encode_ordinary(piece))
        whole = whole and clean
    return tokens, whole


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cut ``text`` before a lone space, where no token reaches across; anywhere if there is none near."""
    start = 0
    while len(text) - start > _PIECE:
        end = start + _PIECE
        lone = [space.start() for space in _LONE_SPACE.finditer(text, end - _PIECE // 10, end)]
        cut = lone[-1] if lone else end
        yield text[start:cut], bool(lone)
        start = cut
    yield text[start:], True


# -- encodings -------------------------------------------------------------------------------------------------------

_FAMILIES = (
    (re.compile(r"gpt-(?:4o|4\.1|4\.5|5|oss)(?![0-9])|chatgpt-4o|o[134](?:-|$)"), "o200k_base"),
    (re.compile(r"gpt-(?:4|3\.5|35)(?:-(?:turbo|32k|16k|vision|preview|[01]\d{3})|$)|text-embedding-"), "cl100k_base"),
)
_MAKER = re.compile(r"^(?:openrouter/)?(?:openai|azure|azure_ai)/")


@lru_cache(maxsize=256)
def encoding_for(model: str) -> str | None:
    """The encoding that ``model`` reads its text in; None where it is not known."""
    name = _MAKER.sub("", model.lower()).removeprefix("ft:")
    return next((encoding for family, encoding in _FAMILIES if family.match(name)), None)


def is_loaded(endpoint: Endpoint) -> bool:
    """Whether counting for the model there would load nothing more."""
    name = None if endpoint.simulated else encoding_for(endpoint.model)
    return name is None or name in _loaded


def load(endpoint: Endpoint) -> None:
    """Load what counting for the model there needs: up to half a second, so call it on a thread of its own."""
    if not is_loaded(endpoint) and (name := encoding_for(endpoint.model)):
        _encoding(name)


# SHA-256 of the unpacked rank file, the pattern that cuts a text before the merges, and the special tokens: as
# tiktoken publishes them.
_ENCODINGS: dict[str, tuple[str, str, dict[str, int]]] = {
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}

_loaded: dict[str, tiktoken.Encoding | None] = {}  # None: it could not be loaded, which was said once
_loading = new_lock()


def _encoding(name: str, *, wait: bool = True) -> tiktoken.Encoding | None:
    if name in _loaded:
        return _loaded[name]
    if not wait:
        return None
    with _loading:
        if name not in _loaded:
            try:
                _loaded[name] = _load(name)
            except Exception:
                log.exception("the encoding %s cannot be loaded; tokens are estimated", name)
                _loaded[name] = None
    return _loaded[name]


def _load(name: str) -> tiktoken.Encoding:
    import lzma
    from binascii import a2b_base64
    from hashlib import sha256
    from importlib.resources import files

    import tiktoken

    digest, pattern, special_tokens = _ENCODINGS[name]
    data = lzma.decompress((files("llmkit.models") / "data" / f"{name}.tiktoken.xz").read_bytes())
    if sha256(data).hexdigest() != digest:
        raise ValueError(f"{name}.tiktoken.xz is not the published rank file")
    fields = data.split()
    ranks = dict(zip(map(a2b_base64, fields[::2]), map(int, fields[1::2]), strict=True))
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


# -- parts of a message ----------------------------------------------------------------------------------------------


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content if _kind(part) == "text")


def _other_parts(content: str | list[dict[str, Any]]) -> list[Any]:
    return [] if isinstance(content, str) else [part for part in content if _kind(part) != "text"]


def _kind(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else ""


def _part_bound(part: Any, model: str) -> int:
    kind = _kind(part)
    if "image" in kind:
        return pictures.bound(model, size_in(part)) or MOST_TOKENS_PER_IMAGE
    size = _json_size(part)
    points_elsewhere = not kind.startswith("tool") and size < MOST_TOKENS_PER_IMAGE
    return size + MOST_TOKENS_PER_IMAGE if points_elsewhere else size


def _json_size(value: Any) -> int:
    try:
        return len(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError):  # nothing that could be sent
        return MOST_TOKENS_PER_IMAGE


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
