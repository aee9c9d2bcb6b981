"""Who owns a call in flight: a process, told apart from a later one with the same number.

An owner is ``host:pid:birth``. ``birth`` is when the process started, as the operating system tells it; on Linux with
the boot it started in, since ticks count from there.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from pathlib import Path

__all__ = ["current_owner", "is_gone"]


def current_owner() -> str:
    """This process."""
    return _owner_of(os.getpid())


@functools.lru_cache(maxsize=2)  # keyed by the process: a forked child is another owner
def _owner_of(pid: int) -> str:
    return f"{_host()}:{pid}:{_birth(pid) or ''}"


def is_gone(owner: str) -> bool | None:
    """Whether the owner's process has ended; None when that cannot be known from here (another host)."""
    place, _, birth = owner.rpartition(":")
    host, _, pid = place.rpartition(":")
    if host != _host() or not birth or not (pid.isascii() and pid.isdigit()):
        return None
    return _birth(int(pid)) != birth


def _host() -> str:
    return socket.gethostname()


if sys.platform == "win32":

    def _birth(pid: int) -> str | None:
        """When the process started; None where there is none."""
        import ctypes

        kernel = ctypes.windll.kernel32
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, pid))  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return None
        times = [ctypes.c_uint64() for _ in range(4)]  # creation, exit, kernel, user
        try:
            known = kernel.GetProcessTimes(handle, *(ctypes.byref(time) for time in times))
            return str(times[0].value) if known and not times[1].value else None
        finally:
            kernel.CloseHandle(handle)

elif sys.platform == "linux":

    def _birth(pid: int) -> str | None:
        """When the process started; None where there is none, or where it only waits to be buried."""
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = status.rpartition(")")[2].split()  # the name before it may hold anything
        return None if fields[0] in "ZX" else f"{_boot()}.{fields[19]}"

    @functools.cache
    def _boot() -> str:
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        except OSError:
            return "boot"

else:

    def _birth(pid: int) -> str | None:
        """When the process started; None where there is none."""
        import subprocess

        command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        try:
            answer = subprocess.run(  # noqa: S603 - all that varies is a number
                command, capture_output=True, text=True, timeout=5, check=False, env={"LC_ALL": "C", "TZ": "UTC"}
            )
        except (OSError, subprocess.SubprocessError):
            return None
        state, _, birth = answer.stdout.strip().partition(" ")
        return None if not birth or state.startswith("Z") else "-".join(birth.split()).replace(":", ".")
