from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from llmkit.state.owner import current_owner, is_gone


def owner_of(process):
    """What the process itself would say; it prints it."""
    return process.stdout.readline().decode().strip()


def other_process():
    code = "from llmkit.state.owner import current_owner; print(current_owner(), flush=True); input()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_this_process_lives():
    assert is_gone(current_owner()) is False
    assert str(os.getpid()) in current_owner()


def test_a_process_lives_until_it_is_killed_even_before_it_is_buried():
    with other_process() as process:
        owner = owner_of(process)
        assert is_gone(owner) is False
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not is_gone(owner) and time.monotonic() < deadline:  # a zombie until it is waited for
            time.sleep(0.01)
        assert is_gone(owner) is True
        process.wait(10)
    assert is_gone(owner) is True


def test_another_process_with_the_same_number_is_another():
    place, _, birth = current_owner().rpartition(":")
    assert is_gone(f"{place}:{birth}0") is True


def test_what_cannot_be_known_is_not_guessed():
    host, pid, birth = current_owner().rsplit(":", 2)
    assert is_gone(f"{host}-elsewhere:{pid}:{birth}") is None
    assert is_gone(f"{host}:{pid}:") is None
    assert is_gone(f"{host}:one:{birth}") is None
    assert is_gone("nonsense") is None
    assert is_gone("") is None
