"""Write a commented sweep file for your own data: LoRA at several ranks beside full fine-tuning.

The task and its columns are guessed from the first rows of --data (a file, a folder or a Hub data set), by what they
are called and what they hold; comments say what was found, and `lorabench plan` checks all of it. Goes to stdout, or
with -o to a new file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lorabench.commands._arguments import argument, hush_libraries
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    argument("--data", "a file, a folder or a Hub data set (default: what is built in)", metavar="DATA"),
    argument("--task", "how its rows are read (default: the first that can)", choices=plugins.names("tasks")),
    argument("--model", "a Hub id or a local folder (default: the built-in one)", metavar="MODEL"),
    argument("-o --output", "the file to write, a new one", type=Path, metavar="FILE"),
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.config.durable import write_bytes
    from lorabench.spec.new_sweep import new_sweep

    output = arguments.output
    if output is not None and os.path.lexists(output):
        raise InputError(f"--output {show_path(output)}: is there already, and not written over")
    hush_libraries()
    text = new_sweep(arguments.task, arguments.data, arguments.model, str(output or "FILE.toml"))
    if output is None:
        tell(text, end="")
        return 0
    write_bytes(output, text.encode())
    talk(f"wrote {show_path(output)}; `lorabench plan {show_path(output)}` shows what it will run")
    return 0
