"""``llmkit`` at the shell. What each command does stands in a file of its own in `llmkit.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from llmkit import __version__
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended

EXAMPLES = """\
examples:
  llmkit demo                      ask the simulator, watch a retry and a fallback, see the ledger
  llmkit demo --model openai:gpt-5-mini "Explain SSE in one line."
  llmkit lab                       JupyterLab on the quickstart notebook
  llmkit lab ~/work --no-browser   in that folder; what llmkit does not know goes to jupyter lab
  llmkit doctor                    what llmkit finds here: keys (never shown), servers, settings, store
  llmkit report model 7d           what calls cost and what was saved: by day, hour, week, month, model, user or tag
  llmkit export calls.csv          the ledger as .csv, .jsonl or .parquet
  llmkit sanitize                  the file that lets nbval overlook times: pytest --nbval-sanitize-with FILE
  llmkit simulate --port 8765      the simulator as a server for any client
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmkit",
        description="LLM calls in Jupyter that are safe, cheap and visible.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the main job, in the terminal; on the simulator, so it costs nothing")
    demo.add_argument("prompt", nargs="?", help="what to ask")
    demo.add_argument("-m", "--model", help="ask this model instead of the simulator; this may cost money")

    lab = commands.add_parser(
        "lab",
        help="open JupyterLab on the quickstart notebook",
        description="Open JupyterLab on the quickstart notebook. Everything behind PATH goes to jupyter lab.",
    )
    lab.add_argument("path", nargs="?", metavar="PATH", help="a notebook to open, or a folder to put the quickstart in")

    commands.add_parser("doctor", help="what llmkit finds here, and what is wrong with it")

    report = commands.add_parser("report", help="what was spent, and what was saved")
    report.add_argument("by", nargs="?", metavar="BY", help="day (default), hour, week, month, model, user or tag")
    report.add_argument("since", nargs="?", metavar="SINCE", help="how far back: 30d (default), 12h, 2w …")

    export = commands.add_parser("export", help="the ledger as a file: every call with its attempts")
    export.add_argument("path", metavar="PATH", help="a file that ends in .csv, .jsonl or .parquet")
    export.add_argument("--overwrite", action="store_true", help="replace a file that is there already")

    commands.add_parser("sanitize", help="print the path of the file that lets nbval overlook how long answers took")

    simulate = commands.add_parser(
        "simulate", help="serve the simulator over HTTP, for any client of either wire format"
    )
    simulate.add_argument("--port", type=_port, default=8765, help="default: 8765; 0 takes a free one")
    simulate.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    return parser


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65_535:
        raise argparse.ArgumentTypeError(f"a port is a whole number from 0 to 65535, not {text!r:.40}")
    return port


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What llmkit reads itself, and what ``llmkit lab`` hands on: all behind its path."""
    if arguments[:1] != ["lab"]:
        return arguments, []
    ours = len(arguments) > 1 and (arguments[1] in {"-h", "--help"} or not arguments[1].startswith("-"))
    return arguments[: 1 + ours], arguments[1 + ours :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 after an error, which stands on stderr as one block; 130 after an interrupt. Wrong arguments exit with 2.
    """
    own, others = _split(list(sys.argv[1:] if arguments is None else arguments))
    given = _parser().parse_args(own)
    given.others = others
    try:
        return int(import_module(f"llmkit.commands.{given.command}").run(given))
    except LLMKitError as error:
        print(error.block(), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        block = getattr(interrupt, "block", None)
        print(block() if block else "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `llmkit demo | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
