"""nbval's strict comparison of notebooks, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

WAIT_S = 240

# Of all the plugins that are installed only nbval: some import for seconds. So does a grammar of international
# addresses that the schema of notebooks has no use for.
PROGRAM = """
import sys
sys.modules["rfc3987_syntax"] = None
import pytest
sys.exit(pytest.main())
"""


def nbval(folder, env, *arguments):
    """What it says of the notebooks of ``folder`` that ``arguments`` name; ``env`` is the kernels' environment, too."""
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "nbval.plugin", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", ".", "--nbval", "--nbval-current-env", *arguments]
    env = env | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=WAIT_S)
