"""When a cell is drawn, and what its status says."""

from __future__ import annotations

import os
import signal
import threading
from decimal import Decimal

import pytest

from llmkit.events import AlertRaised, AttemptStarted, BudgetWarning, FellBack, Waiting
from llmkit.notebook.asking import LONGEST_PAUSE_S, Pace, Progress, _uninterrupted
from llmkit.notebook.display import Quiet


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_at_most_ten_drawings_a_second() -> None:
    time = Time()
    pace = Pace(time)
    drawn = 0
    for _ in range(1000):  # a second of chunks, one a millisecond
        if pace.due():
            pace.drawn(100)
            drawn += 1
        time.now += 0.001
    assert drawn == 10


def test_long_texts_are_drawn_less_often() -> None:
    time = Time()
    pace = Pace(time)
    pace.drawn(200_000)
    time.now += 0.9
    assert not pace.due()
    time.now += 0.2
    assert pace.due()
    pace.drawn(1_000_000_000)
    time.now += LONGEST_PAUSE_S
    assert pace.due()


def test_a_wait_is_counted_down() -> None:
    time = Time()
    progress = Progress("smart", time)
    assert progress.status() == "waiting for smart …"
    progress.hear(AttemptStarted("r", "openai:gpt-5", 1))
    assert progress.status() == "waiting for openai:gpt-5 …"
    time.now += 4
    assert progress.status() == "waiting for openai:gpt-5 … 4 s"
    progress.hear(Waiting("r", 3.0, "openai:gpt-5 answered 503", "openai:gpt-5"))
    seen = []
    for _ in range(7):
        seen.append(progress.status().rpartition("retrying in ")[2])
        time.now += 0.5
    assert seen == ["3 s", "3 s", "2 s", "2 s", "1 s", "1 s", "0 s"]
    progress.hear(AttemptStarted("r", "openai:gpt-5", 2))
    assert progress.status() == "waiting for openai:gpt-5, attempt 2 …"


def test_a_wait_for_room_in_a_budget_is_no_retry() -> None:
    time = Time()
    progress = Progress("smart", time)
    full = "session: $0 of $1 spent, $0.90 held by calls in flight"
    progress.hear(Waiting("r", 119.5, full, "openai:gpt-5", for_room=True))
    assert progress.status() == f"{full}; waiting for room, at most 120 s"
    progress.hear(Waiting("r", 3.0, "openai:gpt-5 answered 503", "openai:gpt-5"))
    assert progress.status().endswith("answered 503; retrying in 3 s")


def test_a_short_wait_has_no_countdown() -> None:
    progress = Progress("smart", Time())
    progress.hear(Waiting("r", 0.4, "openai:gpt-5 answered 503", "openai:gpt-5"))
    assert progress.status() == "openai:gpt-5 answered 503"


def test_a_fallback_stays_visible_while_the_next_one_is_asked() -> None:
    progress = Progress("smart", Time())
    progress.hear(FellBack("r", "openai:gpt-5", "local:tiny", "ProviderOverloaded: answered 503"))
    progress.hear(AttemptStarted("r", "local:tiny", 2))
    assert progress.status() == "fell back from openai:gpt-5 (ProviderOverloaded); waiting for local:tiny, attempt 2 …"


def test_warnings_and_alerts_are_kept_for_the_footer() -> None:
    progress = Progress("smart", Time())
    progress.hear(BudgetWarning("r", "day", "the day is used up to 85 %"))
    progress.hear(AlertRaised("r", "call", "this call cost $2", Decimal(2), Decimal(1)))
    parts = progress.without_answer(Quiet())
    assert [(part.text, part.below) for part in parts] == [
        ("the day is used up to 85 %", True),
        ("this call cost $2", True),
    ]
    assert progress.status() == "waiting for smart …"


def test_reasons_from_a_server_are_kept_short() -> None:
    progress = Progress("smart", Time())
    progress.hear(Waiting("r", 5.0, "x" * 10_000, "openai:gpt-5"))
    assert len(progress.status()) < 200


def test_a_drawing_is_not_cut_in_half_by_an_interrupt() -> None:
    handler = signal.getsignal(signal.SIGINT)
    drawn = []
    with pytest.raises(KeyboardInterrupt), _uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        drawn.append("all of it")
    assert drawn == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_cell_in_another_thread_draws_as_well() -> None:
    drawn = []

    def draw() -> None:
        with _uninterrupted():
            drawn.append(1)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert drawn == [1]
