"""llmkit.state.board: what has been sent is known after a kill, and when in doubt it counts as sent."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmkit.state import board as module
from llmkit.state.board import SHEETS, SLOTS, Board, clear_boards, was_sent
from llmkit.state.owner import current_owner

PROCESS = """
import sys
from pathlib import Path
from llmkit.state.board import Board
from llmkit.state.owner import current_owner

board = Board(Path(sys.argv[1]))
idle, sent, ended = board.take(), board.take(), board.take()
board.mark(sent)
board.mark(ended)
board.free(ended)
print(current_owner(), idle, sent, ended, flush=True)
if sys.stdin.readline() == "end\\n":
    board.free(idle)
    board.free(sent)
else:
    sys.stdin.readline()
"""


def started(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    owner, *slots = process.stdout.readline().split()
    return process, owner, [int(slot) for slot in slots]


def ended(process, how):
    if how == "kill":
        process.send_signal(signal.SIGKILL)
    process.communicate("end\n" if how == "end" else None, timeout=20)


@pytest.fixture
def killed(tmp_path):
    """A folder with the board of a process that was killed; its owner; an unsent, a sent and a freed slot of it."""
    process, owner, slots = started(tmp_path / "board")
    ended(process, "kill")
    return tmp_path / "board", owner, slots


def board_file(folder):
    (found,) = folder.iterdir()
    return found


def test_after_a_kill_it_is_known_what_was_sent(killed) -> None:
    folder, owner, (idle, sent, freed) = killed
    assert not was_sent(folder, owner, idle)
    assert was_sent(folder, owner, sent)
    assert was_sent(folder, owner, freed), "a slot that nobody has says nothing"


def test_only_its_owner_can_read_it(killed) -> None:
    folder, _, _ = killed
    assert folder.stat().st_mode & 0o777 == 0o700
    assert board_file(folder).stat().st_mode & 0o777 == 0o600
    assert board_file(folder).stat().st_size < 10_000


def test_a_folder_that_others_can_read_is_closed(tmp_path) -> None:
    (tmp_path / "board").mkdir(mode=0o755)
    Board(tmp_path / "board").take()
    assert (tmp_path / "board").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("slot", [None, -1, SLOTS * SHEETS, 2**70, True, 1.0, "1"])
def test_a_slot_that_cannot_be_counts_as_sent(killed, slot) -> None:
    folder, owner, _ = killed
    assert was_sent(folder, owner, slot)


@pytest.mark.parametrize("owner", ["", "elsewhere:1:2", "../../etc/passwd", "a\nb", "\ud800", "x" * 10_000])
def test_an_owner_without_a_board_counts_as_sent(killed, owner) -> None:
    assert was_sent(killed[0], owner, killed[2][0])
    assert was_sent(None, owner, 0)


def to_a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def to_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def to(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


SPOILT = {
    "cut": to(lambda content: content[:100]),
    "empty": to(lambda _: b""),
    "longer": to(lambda content: content + b"\1" * 100),
    "zeros": to(lambda content: b"\0" * len(content)),
    "ones": to(lambda content: b"\1" * len(content)),
    "another owner": to(lambda content: content.replace(b":", b";", 1)),
    "another boot": to(lambda content: content.replace(b"llmkit board 1\n", b"llmkit board 1\n0", 1)[:-1]),
    "a link": to_a_link,
    "a pipe": to_a_pipe,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_board_that_is_not_as_it_was_written_counts_as_sent(killed, how) -> None:
    folder, owner, (idle, _, _) = killed
    SPOILT[how](board_file(folder))
    assert was_sent(folder, owner, idle)


def test_two_ledgers_of_one_process_do_not_write_over_each_other(tmp_path) -> None:
    boards = [Board(tmp_path) for _ in range(3)]
    slots = [board.take() for board in boards]
    assert len(set(slots)) == 3
    boards[1].mark(slots[1])
    boards[0].mark(slots[2])  # not its own
    assert [was_sent(tmp_path, current_owner(), slot) for slot in slots] == [False, True, False]


def test_a_slot_is_nobodys_until_it_is_freed(tmp_path) -> None:
    board = Board(tmp_path)
    slots = [board.take() for _ in range(SLOTS)]
    assert len(set(slots)) == SLOTS
    assert board.take() is None, "full"
    board.mark(slots[7])
    board.free(slots[7])
    board.free(slots[7])
    board.free(None)
    again = board.take()
    assert again == slots[7]
    assert not was_sent(tmp_path, current_owner(), again)
    assert board.take() is None, "freed twice, there once"


def test_threads_get_slots_of_their_own(tmp_path) -> None:
    board = Board(tmp_path)
    taken: list[int | None] = []

    def work() -> None:
        for _ in range(300):
            slot = board.take()
            board.mark(slot)
            taken.append(slot)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 2400
    assert len(list(tmp_path.iterdir())) == 1
    assert all(was_sent(tmp_path, current_owner(), slot) for slot in taken)


def test_where_no_board_can_be_made_nothing_is_noted_and_it_is_said_once(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "board")
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        assert [board.take(), board.take()] == [None, None]
    assert len(caplog.records) == 1
    board.mark(None)
    board.free(None)
    board.close()
    assert Board(None).take() is None


def test_a_disk_that_is_full_leaves_no_half_of_a_board(tmp_path, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    assert Board(tmp_path).take() is None
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_more_boards_than_a_process_may_have_note_nothing(tmp_path) -> None:
    boards = [Board(tmp_path) for _ in range(SHEETS + 1)]
    slots = [board.take() for board in boards]
    assert slots[-1] is None
    assert slots[-2] == (SHEETS - 1) * SLOTS
    assert not was_sent(tmp_path, current_owner(), slots[-2])


def test_a_forked_child_has_one_of_its_own(tmp_path) -> None:
    board = Board(tmp_path)
    slot = board.take()
    child = os.fork()
    if child == 0:
        board.mark(slot)  # the parent's: not the child's to say
        board.free(slot)
        mine = board.take()
        board.mark(mine)
        good = len(list(tmp_path.iterdir())) == 2 and was_sent(tmp_path, current_owner(), mine)
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not was_sent(tmp_path, current_owner(), slot)
    board.mark(slot)
    assert was_sent(tmp_path, current_owner(), slot)


def test_closing_removes_the_file_unless_a_slot_is_taken(tmp_path) -> None:
    board = Board(tmp_path)
    slot = board.take()
    board.close()
    assert not was_sent(tmp_path, current_owner(), slot)
    board.mark(slot)
    assert was_sent(tmp_path, current_owner(), slot), "a call that is still in flight can note it"
    board.free(slot)
    board.close()
    board.close()
    assert list(tmp_path.iterdir()) == []
    assert board.take() == slot, "it can be used again"


def test_a_board_that_nobody_has_any_more_goes_with_it(tmp_path) -> None:
    board = Board(tmp_path)
    board.free(board.take())
    del board
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_well_leaves_no_file(tmp_path) -> None:
    process, _, _ = started(tmp_path)
    ended(process, "end")
    assert list(tmp_path.iterdir()) == []


def test_boards_of_the_dead_are_cleared_when_their_holds_have_been_ended(tmp_path) -> None:
    running, alive, (idle, _, _) = started(tmp_path)
    process, dead, _ = started(tmp_path)
    ended(process, "kill")
    (tmp_path / "of-something-else.txt").write_text("mine")
    assert clear_boards(tmp_path, {dead}) == 0
    assert clear_boards(tmp_path, set()) == 1
    assert not was_sent(tmp_path, alive, idle)
    ended(running, "kill")
    assert clear_boards(tmp_path, set()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["of-something-else.txt"]
    assert clear_boards(tmp_path / "missing", set()) == 0


def test_a_board_that_cannot_be_asked_after_goes_when_it_is_very_old(tmp_path) -> None:
    path = tmp_path / "0123.0.board"
    path.write_bytes(b"nonsense")
    assert clear_boards(tmp_path, set()) == 0
    old = time.time() - 40 * 86_400
    os.utime(path, (old, old))
    assert clear_boards(tmp_path, set()) == 1


def test_an_owner_of_another_host_is_never_said_to_have_sent_nothing(tmp_path, monkeypatch) -> None:
    board = Board(tmp_path)
    slot = board.take()
    owner = current_owner()
    monkeypatch.setattr(module, "_boot", lambda: "another machine")
    assert was_sent(tmp_path, owner, slot)
