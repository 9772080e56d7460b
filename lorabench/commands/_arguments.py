"""What the commands share: arguments, and what these mean."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.terminal.hush import hush_libraries as hush_libraries
from lorabench.terminal.text import talk

if TYPE_CHECKING:
    from lorabench.store.store import Store
    from lorabench.updates.formats import Adapter

Argument = tuple[str, dict[str, Any]]
"""Names, and the options of argparse's `add_argument`."""


def argument(names: str, text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return names, options | {"help": text}


def number(kind: type, low: float) -> Callable[[str], Any]:
    """An argument of at least `low`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"'{clip(text)}': must be a number of at least {low:g}")
        return value

    return convert


def numbers(kind: type) -> Callable[[str], Any]:
    """An argument of several finite numbers with commas between them."""

    def convert(text: str) -> Any:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"'{clip(text)}': must be finite numbers with commas between them")
        return values

    return convert


def pack_size(text: str) -> int | str:
    """`auto`, `off` or a number of runs."""
    if text in ("auto", "off"):
        return text
    try:
        return int(number(int, 1)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{clip(text)}': must be auto, off or a whole number of at least 1") from None


JSON = argument("--json", "print JSON instead of a table", action="store_true")
SWEEP = argument("sweep", "a sweep file", metavar="SWEEP.toml")
DEFAULT_RESULTS = Path("results")
RESULTS = argument(
    "--results", "where the runs are kept (default: results)", type=Path, default=DEFAULT_RESULTS, metavar="DIR"
)
PLACE = [
    argument(
        "results", "where the runs are kept, another way of saying --results", metavar="RESULTS", type=Path, nargs="?"
    ),
    argument("sweep", "a sweep file, or the name of a sweep in the results", metavar="SWEEP", nargs="?"),
    argument("--results", "where the runs are kept (default: results)", type=Path, dest="folder", metavar="DIR"),
]
"""Of a command on the results of one sweep, or of all: `settle_place` says what they mean."""
PROCESSES = argument(
    "--workers", "processes that share what is to compute (default: one a core; 1 where there is little)",
    type=number(int, 1), metavar="N",
)  # fmt: skip
BASE = argument(
    "--base",
    "the untouched weights: where ΔW is a difference of checkpoints, or needs them (DoRA); they tell modules' names",
    metavar="BASE",
)
ALPHA = argument("--alpha", "α of a format that does not keep its own", type=float, metavar="ALPHA")


def page_file(text: str) -> Path:
    """A page that can be written: said before anything is computed, and never over what is no page."""
    path, what = Path(text), f"--html {show_path(text)}"
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{what}: must end in .html")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{what}: is there, and is no file")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not os.path.isdir(folder):
        raise InputError(f"{what}: {show_path(folder)} is no folder")
    return path


HTML = argument("--html", "write a page with figures too", type=page_file, metavar="FILE.html")
RETRY = argument(
    "--retry",
    "repeat what has ended as: failed, oom, timeout, diverged, corrupt (every file of a run is read) or all "
    "(several: comma)",
    default="",
    metavar="STATUS",
)
SET = argument(
    "--set",
    "change a key of the sweep's runs; VALUE is TOML, a list is an axis (several: --set ... --set ...)",
    action="append",
    default=[],
    metavar="KEY=VALUE",
)
LIMIT = argument("--limit", "the first N runs alone that are still to do", type=number(int, 1), metavar="N")
PACK = argument(
    "--pack",
    "runs of one base at most that share their passes: N, off, or auto for as many as pay (default: auto)",
    type=pack_size,
    default="auto",
    metavar="N",
)
DEVICE = argument("--device", "auto (default), cpu, cuda or cuda:1", default="auto")


def as_json(table: Any) -> str:
    return json.dumps(_finite(table), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a diverged run's loss becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_store(root: Path) -> Store:
    from lorabench.store.store import Store

    if not os.path.isdir(root):
        raise InputError(f"RESULTS = {show_path(root)}: no such folder")
    return Store(root)


def settle_place(arguments: argparse.Namespace) -> None:
    """Set `results` and `sweep` as they are meant: what stands alone may be either. InputError for two folders."""
    given, folder = arguments.results, arguments.folder
    if given is None or (folder is None and arguments.sweep is not None):
        arguments.results = given or folder or DEFAULT_RESULTS
    elif folder is not None and arguments.sweep is not None:
        raise InputError(f"--results {show_path(folder)}: RESULTS = {show_path(given)} stands there too")
    elif folder is not None or _is_sweep(given):
        arguments.results, arguments.sweep = folder or DEFAULT_RESULTS, str(given)


def _is_sweep(given: Path) -> bool:
    """Whether it is a file, or names a sweep in the default folder."""
    is_named = os.path.isfile(DEFAULT_RESULTS / given / "sweep.toml")
    return not os.path.isdir(given) and (is_named or os.path.isfile(given))


def device_here(name: str) -> str:
    """The device's name; InputError where it is none, or this machine has none such."""
    from lorabench.processes.machine import visible_gpus

    visible_gpus(name)
    return name


def begin(arguments: argparse.Namespace) -> tuple[Store, str]:
    """Store and device of a command that computes on runs; the libraries are silent from here on."""
    store, device = open_store(arguments.results), device_here(arguments.device)
    hush_libraries()
    return store, device


def changes(texts: list[str]) -> dict[str, Any]:
    """What `--set` names, key -> value. InputError with every problem."""
    from lorabench.spec.source import parse_change

    found, problems = {}, []
    for text in texts:
        try:
            key, value = parse_change(text)
            found[key] = value
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def share_of(flag: str, value: float) -> float:
    if not 0 < value <= 1:
        raise InputError(f"{flag} {value:g}: must be above 0 and at most 1")
    return value


def of_run(source: str, root: Path) -> str:
    """The folder of the run whose id begins so; what is a path or a Hub id, or begins no run's id, is left as it is.

    InputError where several begin so, or the run is not done.
    """
    from lorabench.status.logs import find_run
    from lorabench.store.store import Store

    store = Store(root)
    is_path = os.path.exists(source) or "/" in source or not source
    if is_path or not any(run_id.startswith(source) for run_id in store.run_ids()):
        return source
    run_id = find_run(store, source)
    store.done(run_id, "ADAPTER")
    return str(store.folder(run_id))


def open_adapter(source: str, arguments: argparse.Namespace) -> Adapter:
    """Opened; what its reader has to say of it is said, a guessed scale as a warning. InputError where it is a run's,
    and not what it was when the run ended."""
    source = of_run(source, arguments.results)
    if arguments.alpha is not None and not 0 < arguments.alpha < math.inf:
        raise InputError(f"--alpha {arguments.alpha:g}: must be a number above 0")
    from lorabench.store.store import check_run
    from lorabench.updates.formats import open_adapter

    check_run(source)
    adapter = open_adapter(source, base=arguments.base, alpha=arguments.alpha)
    if adapter.scale_source == "assumed":
        talk(f"warning: {show_path(source)}: its scale is assumed; --alpha sets it")
    for note in adapter.notes:
        talk(f"{show_path(source)}: {note}")
    return adapter


def write_page(file: Path, text: str) -> None:
    from lorabench.config.durable import write_bytes

    write_bytes(file, text.encode())
    talk(f"wrote {show_path(file)}")


def import_for_plan() -> None:
    """What `lorabench.launch.plan` imports, in half the time, and hushed; garbage is looked for less often."""
    import gc

    from lorabench.launch.worker import ALONE_VARIABLE

    hush_libraries()
    os.environ[ALONE_VARIABLE] = "1"
    import lorabench.launch.preload  # noqa: F401

    os.environ.pop(ALONE_VARIABLE, None)  # where it was imported already
    gc.set_threshold(50_000)
