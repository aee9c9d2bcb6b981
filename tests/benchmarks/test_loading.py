"""What loading costs over a bare IPython shell, and how soon the first answer stands there. Each in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap

SHELL = """
import gc, json, sys, time
from IPython.core.interactiveshell import InteractiveShell
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
shell = InteractiveShell.instance()
shell.run_cell("1 + 1")
shell.run_line_magic("load_ext", "{bystander}") if "{bystander}" else None
gc.collect(); memory = resident()
start = time.perf_counter()
shell.run_line_magic("load_ext", "{extension}")
load = time.perf_counter() - start
gc.collect(); memory = resident() - memory
start = time.perf_counter()
if "{extension}" == "llmkit":
    result = shell.run_cell("%%llm\\nHello, what are you?")
    assert result.success
print()
print(json.dumps({{"load_ms": load * 1000, "memory_mb": memory, "cell_ms": (time.perf_counter() - start) * 1000}}))
"""


def measured(extension: str, tmp_path, rounds: int = 7) -> dict[str, float]:
    environ = {
        **os.environ,
        "LLMKIT_OFFLINE": "1",
        "LLMKIT_DATA_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    code = textwrap.dedent(SHELL).format(extension=extension, bystander="")
    runs = []
    for _ in range(rounds + 1):
        out = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    return {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}


def test_load_and_first_cell(benchmark, tmp_path) -> None:
    ours = benchmark.pedantic(lambda: measured("llmkit", tmp_path), rounds=1)
    other = measured("autoreload", tmp_path)
    print(f"\n%load_ext llmkit: {ours['load_ms']:.1f} ms, {ours['memory_mb']:.1f} MB over a bare shell", end="")
    print(f" (autoreload: {other['load_ms']:.1f} ms, {other['memory_mb']:.1f} MB; targets 40 ms, 6 MB)")
    print(f"first %%llm cell on the simulator: {ours['cell_ms']:.0f} ms (target 400)")
    benchmark.extra_info.update(ours)
    assert ours["load_ms"] <= 40
    assert ours["memory_mb"] <= 6
    assert ours["cell_ms"] <= 400
