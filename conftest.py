"""Before anything is imported and any kernel starts: no key, no real provider, no ledger of the user's.

Tests and notebooks run here and in kernels, which inherit this environment. So whatever keys a machine holds, nothing
that pytest runs can reach a provider or spend.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile

import pytest

# Keys and tokens of any service, and the variables that move a provider somewhere else.
UNWANTED = re.compile(
    r"LLMKIT_(?!ENGINE_).*|.*_(KEY|TOKEN|SECRET|BASE_URL|API_BASE)|OLLAMA_HOST|(HTTPS?|ALL)_PROXY", re.IGNORECASE
)

for _name in [name for name in os.environ if UNWANTED.fullmatch(name)]:
    del os.environ[_name]

_data = tempfile.mkdtemp(prefix="llmkit-tests-")
os.environ |= {
    "LLMKIT_OFFLINE": "1",  # only loopback: anything else is an error before it is sent
    "LLMKIT_DISPLAY": "final",  # a cell shows its end once, without times and ids
    "LLMKIT_DATA_DIR": _data,
}

# What a shell starts in the background is told to ignore interrupts, and hands that on to every kernel and command. The
# tests interrupt those, so they must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # nbval would start a second coverage inside each kernel; coverage's own way into subprocesses measures them already.
    config.option.cov_source = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail when anything was skipped: nothing may be missing")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None and reporter.stats.get("skipped"):
        reporter.section("skipped, and --no-skips", sep="=", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    shutil.rmtree(_data, ignore_errors=True)
