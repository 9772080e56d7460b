"""The command line: a thin table of commands, one file each in `lorabench/commands/`.

Data goes to stdout, talk to stderr. Exit codes: 0 all well, 1 some run (or part of a report) failed, 2 the input was
wrong. A command's docstring is its help; it imports what it needs when it is called, so that `--help` is quick. Flags
choose where and how many, never what is computed.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import shutil
import signal
import sys
import threading
from typing import Any, NoReturn

from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import LENGTH, message, show_path
from lorabench.processes.machine import PATIENT_THREADS
from lorabench.terminal.text import talk

COMMANDS = (
    "new",
    "plan",
    "run",
    "submit",
    "status",
    "logs",
    "cancel",
    "analyze",
    "report",
    "paper",
    "export",
    "merge",
    "inspect",
    "compare",
    "convert",
    "compress",
    "transfer",
    "intervene",
    "list",
    "completion",
)
"""In the order of `--help`."""
UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ENOENT,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _hear_interrupts()
    for name, value in PATIENT_THREADS.items():
        os.environ.setdefault(name, value)
    try:
        arguments, strange = make_parser().parse_known_args(argv)
        if strange:  # argparse itself would say so of no command
            arguments.parser.error(f"unrecognized arguments: {' '.join(strange)}")
        code = arguments.function(arguments)
        sys.stdout.flush()
    except InputError as error:
        for line in str(error).splitlines():
            talk(f"error: {line}")
        return 2
    except BrokenPipeError:  # `lorabench status | head`: the rest was not wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        talk(f"error: {message(_unwritable(error))}")
        return 2
    return code


def _hear_interrupts() -> None:
    """Let Ctrl-C end a command also where a shell has started it with SIGINT ignored, as it does for `command &`."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _unwritable(error: OSError) -> str:
    """Which file cannot be written and why; raises what is no such error."""
    if isinstance(error, shutil.Error):  # of a folder that is copied: of each file (source, target, why)
        _, target, reason = error.args[0][0]
        return f"{target}: cannot be copied there: {reason}"
    if error.errno not in UNWRITABLE:
        raise error
    name = error.filename2 or error.filename
    return f"{show_path(name)}: {error.strerror}" if name else f"{error.strerror}"


class _Parser(argparse.ArgumentParser):
    """What was given stands in its errors: in one line, and bounded."""

    def error(self, text: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message(text, 4 * LENGTH)}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own names no closest choice."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown("choice", value, [*map(str, action.choices)]))


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorabench", description="What did this fine-tuning change in the weights, and what did it cost?"
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"lorabench.commands.{name}")
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.partition("\n")[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for names, options in module.ARGUMENTS:
            command.add_argument(*names.split(), **options)
        command.set_defaults(function=module.main, parser=command, every=commands.choices)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # slow to import

        print(f"lorabench {version('lorabench')}")
        parser.exit()
