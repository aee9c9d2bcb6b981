"""llmkit.recording.scrubbing and personal: keys always, personal data on request, and nothing that only looks like it."""

from __future__ import annotations

import pytest

from llmkit.recording.scrubbing import Scrub, secrets_in

KEY = "abcdefgh-0123"  # looks like no key of anybody's


def scrubbed(text, *, people=True):
    return Scrub(lambda: {KEY}, of_people=people).text(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ana.maria+news@mail.example.co.uk", "e-mail"),
        ("4111 1111 1111 1111", "card"),
        ("5500-0000-0000-0004", "card"),
        ("378282246310005", "card"),
        ("DE89 3704 0044 0532 0130 00", "IBAN"),
        ("GB82WEST12345698765432", "IBAN"),
        ("NO93 8601 1117 947", "IBAN"),
        ("192.168.17.4", "IP address"),
        ("2001:db8:85a3::8a2e:370:7334", "IP address"),
        ("078-05-1120", "SSN"),
        ("+49 170 1234567", "phone"),
        ("+1-202-555-0143", "phone"),
        ("(030) 1234-5678", "phone"),
        ("0170 123 45 67", "phone"),
        ("030 1234567", "phone"),
        ("0170/1234567", "phone"),
        ("00491701234567", "phone"),
        ("202.555.0143", "phone"),
        ("2012 34 56 78", "phone"),
        ("ana@münchen.example", "e-mail"),
    ],
)
def test_personal_data_becomes_what_it_is(text, kind) -> None:
    assert scrubbed(f"Reach me: {text}, or not.") == f"Reach me: [{kind}], or not."
    assert scrubbed(f"({text})") in {f"([{kind}])", f"[{kind}])"}
    assert scrubbed(f"Reach me: {text}, or not.", people=False) == f"Reach me: {text}, or not."


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # its check digit is wrong
        "DE89 3704 0044 0532 0130 02",
        "0000 0000 0000 0000",
        "the year 2026, 1234 items, 12,345,678.90 USD",
        "2026-11-21 and 21.11.2026 and 11/21/2026",
        "12:30:45",
        "version 1.2.3, 10.0 of 11.5, 999.1.1.1",
        "user@localhost",
        "a < b @ c",
        "3.14159265358979",
        "gpt-5-mini, claude-haiku-4-5",
        "order 20261121-000042",
        "def f(x): return x::int",
        "a::b, x[::], std::vector",
        "2024/05/06 10:11:12, 2024 05 06 07 08",
        "rows 1000-2000 3000-4000",
    ],
)
def test_what_is_none_stays(text) -> None:
    assert scrubbed(text) == text


def test_keys_go_always_known_ones_and_what_looks_like_one() -> None:
    text = f"mine is {KEY}, hers sk-proj-0123456789abcdef, his Bearer abcdefghij0123456789klm"
    for people in (False, True):
        clean = scrubbed(text, people=people)
        assert clean == "mine is [redacted], hers [redacted], his Bearer [redacted]"


def test_a_text_in_pieces_is_cut_where_it_was() -> None:
    pieces = ["Write to ", "ana@", "example", ".com", " or ", "to ", KEY[:4], KEY[4:], "!"]
    clean = Scrub(lambda: {KEY}, of_people=True).pieces(pieces)
    assert clean == ["Write to ", "[e-mail]", "", "", " or ", "to ", "[redacted]", "", "!"]
    assert Scrub(lambda: {KEY}).pieces(["a", "", "b"]) == ["a", "", "b"]
    whole = ["", *"Write to ana@example.com, or to ana@example.com", ""]
    assert "".join(Scrub(tuple, of_people=True).pieces(whole)) == "Write to [e-mail], or to [e-mail]"


def test_what_overlaps_goes_as_a_whole() -> None:
    assert scrubbed("https://ana:secret99@example.com/x") == "https://[redacted]/x"
    assert KEY not in scrubbed(f"{KEY}@example.com and x{KEY}{KEY}")


def test_names_and_numbers_lose_keys_only() -> None:
    tree = {"model": "192.168.17.4:8000", "n": 3, "list": [KEY, None, True], KEY: "x"}
    clean = Scrub(lambda: {KEY}, of_people=True).tree(tree, prose=False)
    assert clean == {"model": "192.168.17.4:8000", "n": 3, "list": ["[redacted]", None, True], "[redacted]": "x"}


def test_which_values_of_the_environment_are_keys() -> None:
    environ = {
        "OPENAI_API_KEY": " plain-words-key ",
        "SHORT_KEY": "ollama",
        "MY_SECRET": "0123456789abcdef!",
        "MY_TOKEN": "production-environment",
        "HOME": "/home/ana0123456789012345",
    }
    found = secrets_in(environ, ["OPENAI_API_KEY", "SHORT_KEY", None, "NOT_THERE"])
    assert found == {"plain-words-key", "0123456789abcdef!"}


def test_a_key_that_is_set_later_is_learned_and_stays_known() -> None:
    environ = {}
    scrub = Scrub(lambda: secrets_in(environ, ["A_KEY"]))
    environ["A_KEY"] = KEY
    assert scrub.text(KEY) == KEY
    scrub.look()
    assert scrub.text(KEY) == "[redacted]"
    del environ["A_KEY"]
    scrub.look()
    assert scrub.text(KEY) == "[redacted]"


def test_a_long_hostile_text_takes_no_long_time() -> None:
    for piece in ("a.", "1-", "1 ", "(12", ":a", "A1", "x@x.", "<a at 0x"):
        Scrub(tuple, of_people=True).text(piece * 20_000)
