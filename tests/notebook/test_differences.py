"""What one text says otherwise than another, and that finding it never takes long."""

from __future__ import annotations

import pytest

from llmkit.notebook import differences
from llmkit.notebook.differences import Differences, Piece


def of(first, second):
    return Differences(first, "answer 1").of(second)


def test_words_are_compared_and_lines_are_kept() -> None:
    found = of("The quick fox\njumps.", "The slow fox\njumps high.")
    assert found.note == "against answer 1: +3 -2 words"
    assert found.pieces == [
        Piece("same", "The "),
        Piece("removed", "quick "),
        Piece("added", "slow "),
        Piece("same", "fox\n"),
        Piece("removed", "jumps."),
        Piece("added", "jumps high."),
    ]


@pytest.mark.parametrize("second", ["", "a b c", "a c d e", "x a b c d", "a  b c d", "\n a b\tc d \n"])
def test_what_is_marked_makes_up_both_texts(second) -> None:
    first = "a b c d"
    pieces = of(first, second).pieces
    if pieces is not None:
        assert "".join(piece.text for piece in pieces if piece.kind != "added") == first
        assert "".join(piece.text for piece in pieces if piece.kind != "removed") == second


def test_the_same_text_is_said_to_be() -> None:
    assert of("a b", "a b") == ("the same as answer 1", None)


def test_texts_that_share_nothing_are_not_marked() -> None:
    found = of("one two three four five", "six seven eight nine five")
    assert found == ("differs from answer 1 throughout", None)


def test_long_texts_are_compared_line_by_line() -> None:
    first = "".join(f"{line} " + "word " * 20 + "\n" for line in range(100))
    second = "new line\n" + first.replace("50 word", "fifty word").replace("2 word", "two word", 1)
    found = of(first, second)
    assert {piece.text.count("\n") for piece in found.pieces if piece.kind != "same"} == {1}
    assert "".join(piece.text for piece in found.pieces if piece.kind != "removed") == second


def test_too_long_is_said() -> None:
    note = "differs from answer 1; too long to mark where"
    assert of("a b c " * 10_000, "b a c " * 10_000) == (note, None)
    lines = "".join(f"{line}\n" for line in range(700))
    assert of(lines, "".join(reversed(lines.splitlines(keepends=True)))) == (note, None)


def test_all_comparisons_together_are_bounded(monkeypatch) -> None:
    """A text made for it: each match splits the rest, which is gone through again."""
    monkeypatch.setattr(differences, "MOST_WORK", 5_000_000)
    first = " ".join(f"x a{number}" for number in range(99))
    texts = [" ".join(f"x {word}{number}" for number in range(99)) for word in "bcdefg"]
    compare = Differences(first, "answer 1")
    notes = [compare.of(text).note for text in texts]
    assert notes[0].startswith("against answer 1")
    assert notes[-1] == "differs from answer 1; too long to mark where"
