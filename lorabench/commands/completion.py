"""Print a script by which a shell completes commands, flags, runs, sweeps and the names of plug-ins.

bash    echo 'source <(lorabench completion bash)' >> ~/.bashrc
zsh     echo 'source <(lorabench completion zsh)' >> ~/.zshrc     (behind compinit)
fish    lorabench completion fish > ~/.config/fish/completions/lorabench.fish
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lorabench.commands._arguments import DEFAULT_RESULTS, argument
from lorabench.config import plugins
from lorabench.terminal.text import tell

SCRIPTS = {
    "bash": r"""_lorabench() {
    local IFS=$'\x1f'
    local words="${COMP_WORDS[*]:1:COMP_CWORD}"
    IFS=$'\n'
    COMPREPLY=($(lorabench completion --complete="$words" 2>/dev/null))
}
complete -o default -F _lorabench lorabench
""",
    "zsh": r"""#compdef lorabench
_lorabench() {
    local -a found
    found=("${(@f)$(lorabench completion --complete="${(pj:\x1f:)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n ${found[1]} ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _lorabench lorabench
""",
    "fish": r"""function __lorabench
    set -l words (commandline -opc) (commandline -ct)
    lorabench completion --complete=(string join \x1f -- $words[2..-1]) 2>/dev/null
end
complete -c lorabench -a '(__lorabench)'
""",
}
"""Each asks `--complete` with the words up to the cursor; where that knows none, it completes file names."""
BETWEEN = "\x1f"
"""Words: as arguments of their own, argparse would take `--` away, and flags for its own."""

ARGUMENTS = [
    argument("shell", "the shell", choices=[*SCRIPTS], nargs="?"),
    argument("--complete", argparse.SUPPRESS),
]


def main(arguments: argparse.Namespace) -> int:
    if arguments.complete is not None:
        for word in complete(arguments.complete.split(BETWEEN), arguments.every):
            tell(word)
    elif arguments.shell is None:
        arguments.parser.error(f"the following arguments are required: shell ({', '.join(SCRIPTS)})")
    else:
        tell(SCRIPTS[arguments.shell], end="")
    return 0


def complete(words: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """What the last of the words may become; they stand behind `lorabench`, the last one is perhaps empty."""
    *before, last = words
    if not before:
        choices: Iterable[str] = [*parsers, "--help", "--version"]
    elif before[0] not in parsers:
        choices = []
    else:
        choices = _choices(before[1:], last, parsers[before[0]])
    return [choice for choice in choices if choice.startswith(last)]


def _choices(before: Sequence[str], last: str, parser: argparse.ArgumentParser) -> Iterable[str]:
    """Flags, or the values of the flag or the argument that comes next."""
    flags = parser._option_string_actions
    places = [action for action in parser._actions if not action.option_strings]
    open_flag, num_places, results = None, 0, DEFAULT_RESULTS
    for word in before:
        if open_flag is not None:
            results = Path(word) if "--results" in open_flag.option_strings else results
            open_flag = None
        elif word in flags:
            open_flag = flags[word] if flags[word].nargs != 0 else None
        else:
            num_places += 1
    if open_flag is not None:
        return _values(open_flag, results)
    if last.startswith("-"):
        return flags
    return _values(places[min(num_places, len(places) - 1)], results) if places else []


def _values(action: argparse.Action, results: Path) -> Iterable[str]:
    find = VALUES.get(str(action.metavar), lambda results: [])
    return map(str, action.choices) if action.choices is not None else find(results)


def _runs(results: Path) -> list[str]:
    folder = results / "runs"
    return sorted(name for name in os.listdir(folder) if name[0] != ".") if folder.is_dir() else []


def _sweeps(results: Path) -> list[str]:
    return sorted(file.parent.name for file in results.glob("*/sweep.toml"))


def _plugins(results: Path) -> list[str]:
    return sorted(
        {*plugins.FOLDERS, "measures", *(name for folder in plugins.FOLDERS for name in plugins.names(folder))}
    )


VALUES: dict[str, Callable[[Path], list[str]]] = {
    "RUN": _runs,
    "ADAPTER": _runs,
    "A": _runs,
    "B": _runs,
    "SWEEP": _sweeps,
    "RESULTS": _sweeps,
    "SWEEP|RUN": lambda results: [*_sweeps(results), *_runs(results)],
    "KIND|NAME": _plugins,
}
"""What an argument is called in `--help` -> what it may be; of all else the shell completes file names."""
