"""The command line: a thin table of commands. Data goes to stdout, talk to stderr.

Exit codes: 0 all well, 1 some run failed, 2 the input was wrong. Each command imports what it needs when it is
called, so that `--help` is quick. Flags choose where and how many, never what is computed.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import plugins
from lorabench.decode import InputError
from lorabench.machine import PATIENT_THREADS
from lorabench.terminal import talk, text_table

if TYPE_CHECKING:
    from lorabench.formats import Adapter
    from lorabench.record import Status, Store
    from lorabench.sweep import Sweep

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    for name, value in PATIENT_THREADS.items():
        os.environ.setdefault(name, value)
    try:
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
        if error.errno not in UNWRITABLE:
            raise
        talk(f"error: {error.filename}: {error.strerror}")
        return 2
    return code


def plan(arguments: argparse.Namespace) -> int:
    """Show the runs of a sweep, which are done, and what each will take.

    For each run: trainable and total parameters (exact), estimated peak memory and time. `basis` says what an
    estimate rests on: `measured` (this run is done), `similar runs` (a finished run of the same model on the same
    kind of device corrects the formula) or `formula`.
    """
    from lorabench.machine import visible_gpus
    from lorabench.record import Store
    from lorabench.sweep import read_sweep

    sweep = read_sweep(Path(arguments.sweep))
    visible_gpus(_device(arguments.device))  # says so where there is none
    _hush_libraries()
    from lorabench.plan import make_plan, plan_text

    result = make_plan(sweep, Store(arguments.results), _device(arguments.device))
    print(_json(result) if arguments.json else plan_text(sweep, result))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing of a sweep.

    Done runs are skipped, also those that another sweep made; interrupted ones go on from their checkpoint; failed
    ones are left alone unless --retry names them. Ctrl-C stops cleanly: every run writes a checkpoint.
    """
    from lorabench.launch import check_writable, launch, summary
    from lorabench.record import Store, write_bytes
    from lorabench.sweep import read_sweep

    retry = _retry(arguments.retry)
    device = _device(arguments.device)
    sweep = read_sweep(Path(arguments.sweep))
    store = Store(arguments.results)
    check_writable(store.root)
    write_bytes(store.root / sweep.name / "sweep.toml", sweep.text.encode())
    outcome = launch(sweep, store, _pool(arguments, device, retry, max(spec.threads for spec in sweep.runs)))
    talk(summary(sweep, outcome))
    return outcome.exit_code


def status(arguments: argparse.Namespace) -> int:
    """Show how every run of a results folder stands, also while runs go on."""
    from lorabench.status import status_json, status_text

    store = _store(arguments.results)
    print(_json(status_json(store)) if arguments.json else status_text(store))
    return 0


def analyze(arguments: argparse.Namespace) -> int:
    """Analyze what the runs have learned and write tables, figures and report.html; prints their paths.

    Without SWEEP, every sweep found in RESULTS. What is up to date is left as it is, and only what is new is
    computed; if it is interrupted, what is computed is kept.
    """
    return _draw(arguments, again=False)


def report(arguments: argparse.Namespace) -> int:
    """Draw the tables, figures and report.html again; analyses that are up to date are not repeated."""
    return _draw(arguments, again=True)


def merge(arguments: argparse.Namespace) -> int:
    """Merge the LoRA adapters of several runs, and evaluate the merges on every run's task.

    Runs are named by their ids, or by what these begin with; they share base and layers. Rows: the base, each adapter
    alone, and each merge; columns: the tasks' validation splits, each with its own run's head where there is one. With
    adapters ΔW = s B A and weights w, --by takes, as PEFT's add_weighted_adapter defines them:

    linear               (Σ √(ws) B)(Σ √(ws) A): the factors are summed apart, so that cross terms come in
    cat                  Σ w ΔW exactly, of rank Σ r
    svd                  the best approximation of Σ w ΔW of rank --rank (where not given: the largest rank)
    ties                 factor by factor: only the --density largest entries stay, a sign is elected for each entry,
                         and those of that sign are averaged (Yadav et al. 2023, arXiv 2306.01708)
    dare_linear          factor by factor: entries stay with probability --density and are divided by it, then summed
                         (Yu et al. 2024, arXiv 2311.03099)
    dare_ties            dropped as dare_linear does, merged as ties does
    magnitude_prune      factor by factor: only the --density largest entries stay, then summed
    ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                         the same on each ΔW itself, then the best approximation of rank --rank

    Those that go factor by factor, and linear, need adapters of one rank.

    Beside it: what each merge changes for each adapter on its own task, and how much every two adapters interfere
    (cosine, overlap of their directions, sign conflicts; chance beside).

    Results are kept in RESULTS/merges/<id>/record.json and RESULTS/pairs/, and read from there the next time.
    """
    store = _store(arguments.results)
    device = _device(arguments.device)
    by = [name.strip() for name in arguments.by.split(",") if name.strip()]
    _hush_libraries()
    from lorabench.merging.adapters import read_adapter
    from lorabench.merging.bodies import bodies
    from lorabench.merging.compose import compose
    from lorabench.merging.interference import change_text, interference, interference_text, merge_text, with_changes

    adapters = [read_adapter(store, given) for given in arguments.runs]
    run_ids = [adapter.record.run_id for adapter in adapters]
    weights = arguments.weights or [1.0] * len(run_ids)
    wanted = bodies(run_ids, by, weights, arguments.density, arguments.rank, arguments.seed or [0])
    records = with_changes(compose(store, adapters, wanted, device, talk), wanted, adapters)
    pairs = interference(store, adapters, talk)
    texts = (merge_text(records, wanted), change_text(records, wanted), interference_text(pairs))
    print(_json({"merges": records, "interference": pairs}) if arguments.json else "\n\n".join(texts))
    return 0


def compress(arguments: argparse.Namespace) -> int:
    """Cut an adapter to the smallest ranks that keep a share of its energy, and show what that costs.

    ADAPTER is a run (its id, what it begins with, or its folder), or a file, folder or Hub id of an adapter. Each
    layer gets the smallest rank k whose singular values hold the share --energy of Σσ² of ΔW, and the best
    approximation of that rank, from the exact SVD: B = U√S and A = √S Vh. It is written as a LoRA in PEFT's format
    with α = r in every layer, so that the scale is 1; a trained task head is carried over. A dense ΔW, as of full
    fine-tuning, becomes a LoRA too; its vectors (biases, norms) have no such factors and are left out.

    A run is evaluated on its own validation and retention data; another adapter as --like says.

    Results are kept in RESULTS/compressions/<id>/ (record.json, adapter/), and read from there the next time.
    """
    from lorabench.record import Store

    store, device = Store(arguments.results), _device(arguments.device)
    _hush_libraries()
    from lorabench.compression.compress import compress as compress_subject
    from lorabench.compression.compress import provenance
    from lorabench.compression.compressible import open_subject
    from lorabench.compression.compression_text import compression_text, copy_adapters

    given = {key: getattr(arguments, key) for key in ("like", "base", "alpha")}
    subject = open_subject(store, arguments.adapter, **given)
    records = compress_subject(store, subject, arguments.energy, device, talk)
    for line in subject.notes:
        talk(line)
    if arguments.output:
        copy_adapters(store, records, arguments.output)
    table = provenance(subject) | {"compressions": records}
    print(_json(table) if arguments.json else compression_text(store, records))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Show what an adapter changed in the weights, layer by layer, beside chance.

    ADAPTER is a file, a folder or a Hub id, of any known format; nothing is unpickled, and no model is loaded. For
    every matrix ΔW: singular values, effective ranks, norms and power-law tail, beside those of a random update of the
    same shape; and the smallest ranks that keep a share of ΔW's energy, as PEFT's `rank_pattern`.
    """
    energy = _share("--energy", arguments.energy)
    from lorabench.examine.inspection import inspect_adapter
    from lorabench.terminal import tracked

    adapter = _adapter(arguments.adapter, arguments)
    found = inspect_adapter(adapter, energy, lambda layers: tracked(layers, len(adapter.entries), "inspecting"))
    if arguments.html:
        from lorabench.examine.inspection_page import inspection_page

        _write_page(arguments.html, inspection_page(found, energy))
    from lorabench.examine.inspection_text import inspection_text

    print(_json(found) if arguments.json else inspection_text(found, energy, bold=sys.stdout.isatty()))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Show how far two adapters changed the same directions, layer by layer, beside chance.

    A and B are files, folders or Hub ids, of any known formats. For every layer that both have, on its input and its
    output side: subspace similarity φ(i, j), principal angles, Grassmann distance, how much of each ΔW lies in the
    other's subspace, and a permutation test of whether the two share directions. Scales play no part in any of these.
    """
    from lorabench.examine.comparison import compare_adapters
    from lorabench.terminal import tracked

    a, b = (_adapter(source, arguments) for source in (arguments.a, arguments.b))
    found = compare_adapters(a, b, lambda pairs, total: tracked(pairs, total, "comparing"))
    if arguments.html:
        from lorabench.examine.comparison_page import comparison_page

        _write_page(arguments.html, comparison_page(found))
    from lorabench.examine.comparison_text import comparison_text

    print(_json(found) if arguments.json else comparison_text(found, bold=sys.stdout.isatty()))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write any LoRA-like adapter in PEFT's format, such that PEFT computes the same ΔW.

    ADAPTER is a file, a folder, a run's folder or a Hub id, of any format that lorabench reads. Refused, with the
    reason, where it would not be exact: a dense ΔW, DoRA, names of which it is not certain which module they mean
    (--base tells). OUTPUT must be new or empty.
    """
    _hush_libraries()
    from lorabench.examine.convert import convert as write_as_peft

    adapter = _adapter(arguments.adapter, arguments)
    for note in write_as_peft(adapter, arguments.output, arguments.base):
        talk(f"note: {note}")
    talk(f"{len(adapter.entries)} layers of {adapter.format}, scale: {adapter.scale_source or 'none'}")
    print(arguments.output)
    return 0


def intervene(arguments: argparse.Namespace) -> int:
    """Scale the intruder dimensions of runs, and evaluate the task and what is retained again.

    Runs are named by their ids, or by what these begin with; runs that differ in the seed alone are averaged. An
    intruder is one of a matrix's top --top left singular vectors of W0 + ΔW whose |cos| with each of W0 is below
    --epsilon. With its singular value σ, the model is evaluated as W0 + ΔW + (λ − 1) Σ u σ vᵀ over the intruders of
    all matrices (Shuttleworth et al. 2024, arXiv 2410.21228): λ = 1 is the model as it is, λ = 0 is without them.
    Rows, beside the untouched base and λ = 1 (tuned):

    intruders    all of them are scaled
    control      as many directions of the same matrices that are no intruders, those of the nearest singular values
    random       Σ σ a bᵀ in random directions a, b instead: as large a change of the weights, of no direction

    Merged and evaluated in float32, on the validation split of the run's (last) task and on its task.retain, with
    changes relative to λ = 1. With five runs or more, Spearman's ρ of the number of intruders with forgetting.

    Results are kept in RESULTS/interventions/<id>/record.json after each evaluation, and read from there the next
    time.
    """
    store = _store(arguments.results)
    device = _device(arguments.device)
    _hush_libraries()
    from lorabench.intervention import intervene, intervene_report

    if arguments.figure is not None:
        intervene_report.check_figure(arguments.figure)
    wanted = intervene.Intervention(
        lambdas=tuple(arguments.lambdas or intervene.LAMBDAS), epsilon=arguments.epsilon, top=arguments.top
    )
    runs = intervene.read_runs(store, arguments.runs)
    records = [intervene.intervene(store, run, wanted, device, talk) for run in runs]
    rows = intervene_report.make_rows(records, wanted)
    if arguments.json:
        correlation = intervene_report.correlation(records)
        print(_json({"interventions": records, "rows": [row.to_json() for row in rows], "spearman": correlation}))
    else:
        print(intervene_report.intervention_text(records, rows))
    if arguments.figure is not None:
        files = intervene_report.draw(rows, arguments.figure)
        talk("wrote " + " and ".join(map(str, files)) if files else "nothing to draw: no run has an intruder")
    return 0


def list_plugins(arguments: argparse.Namespace) -> int:
    """List the methods, tasks, analyses and figures that a sweep file can name."""
    folders = [arguments.kind] if arguments.kind else list(plugins.FOLDERS)
    found = {folder: plugins.describe(folder) for folder in folders}
    rows = [
        {"kind": folder, "name": name, "description": text}
        for folder, entries in found.items()
        for name, text in entries.items()
    ]
    print(_json(found) if arguments.json else text_table(rows, ["kind", "name", "description"]))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorabench", description="What did this fine-tuning change in the weights, and what did it cost?"
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, arguments) in COMMANDS.items():
        text = function.__doc__ or ""
        command = commands.add_parser(
            name, help=_summary(text), description=_dedent(text), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for names, options in arguments:
            command.add_argument(*names.split(), **options)
        command.set_defaults(function=function)
    return parser


def _argument(names: str, text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return names, options | {"help": text}


def _number(kind: type, low: float) -> Callable[[str], Any]:
    """An argument of at least `low`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a number of at least {low:g}")
        return value

    return convert


_JSON = _argument("--json", "print JSON instead of a table", action="store_true")
_SWEEP = _argument("sweep", "a sweep file (TOML)", metavar="SWEEP")
_RESULTS = _argument("--results", "where the runs are kept (default: results)", type=Path, default=Path("results"))
_FOLDER = _argument("results", "a results folder", metavar="RESULTS", type=Path)
_HERE = _argument(
    "results", "a results folder (default: results)", metavar="RESULTS", type=Path, nargs="?", default=Path("results")
)
_NAMED = _argument("sweep", "a sweep file, or the name of a sweep in RESULTS", metavar="SWEEP", nargs="?")
_PROCESSES = _argument(
    "--workers", "processes that share what is to compute (default: one a core; 1 where there is little)",
    type=_number(int, 1), metavar="N",
)  # fmt: skip
_BASE = _argument(
    "--base", "the untouched weights: where ΔW is a difference of checkpoints, or needs them (DoRA)", metavar="BASE"
)
_ALPHA = _argument("--alpha", "α of a format that does not keep its own", type=float, metavar="A")
_HTML = _argument("--html", "write a page with figures too", type=Path, metavar="FILE")
_DEVICE = _argument("--device", "auto (default), cpu, cuda or cuda:1", default="auto")


def _numbers(kind: type) -> Callable[[str], Any]:
    """An argument of several finite numbers with commas between them."""

    def convert(text: str) -> Any:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"{text!r}: must be numbers with commas between them")
        return values

    return convert


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], list[tuple[str, dict[str, Any]]]]] = {
    "plan": (plan, [_SWEEP, _RESULTS, _DEVICE, _JSON]),
    "run": (
        run,
        [
            _SWEEP,
            _RESULTS,
            _argument("--workers", "runs at a time (default: one a GPU, else as many as cores allow)",
                      type=_number(int, 1), metavar="N"),
            _DEVICE,
            _argument("--retry", "repeat what has ended as: failed, oom, timeout, diverged, corrupt or all "
                      "(several: comma)", default="", metavar="STATUS"),
            _argument("--timeout-minutes", "end a run as `timeout` after so long", type=_number(float, 0.01),
                      metavar="M"),
            _argument("--checkpoint-seconds", "write a checkpoint so often (default: 60)", type=_number(float, 0),
                      default=60.0, metavar="S"),
        ],
    ),
    "status": (status, [_HERE, _JSON]),
    "analyze": (analyze, [_FOLDER, _NAMED, _PROCESSES]),
    "report": (report, [_FOLDER, _NAMED, _PROCESSES]),
    "merge": (
        merge,
        [
            _argument("runs", "a run's id, or what it begins with; two or more", nargs="+", metavar="RUN"),
            _argument("--by", "how, one or several with commas (default: linear,svd,ties,dare_linear,dare_ties)",
                      default="linear,svd,ties,dare_linear,dare_ties", metavar="NAME"),
            _argument("--weights", "one a run, with commas (default: 1 each)", type=_numbers(float), metavar="W"),
            _argument("--density", "share of the entries that stay (default: 0.5)", type=_number(float, 0),
                      default=0.5, metavar="D"),
            _argument("--rank", "of a merge that ends in svd", type=_number(int, 1), metavar="R"),
            _argument("--seed", "of DARE, one or several with commas (default: 0)", type=_numbers(int), metavar="S"),
            _RESULTS,
            _DEVICE,
            _JSON,
        ],
    ),
    "inspect": (
        inspect,
        [
            _argument("adapter", "a file, a folder or a Hub id", metavar="ADAPTER"),
            _BASE,
            _ALPHA,
            _argument("--energy", "share of ‖ΔW‖² that the advised ranks keep (default: 0.95)", type=float,
                      default=0.95, metavar="Q"),
            _HTML,
            _JSON,
        ],
    ),
    "compare": (
        compare,
        [
            _argument("a", "a file, a folder or a Hub id", metavar="A"),
            _argument("b", "another", metavar="B"),
            _BASE,
            _ALPHA,
            _HTML,
            _JSON,
        ],
    ),
    "convert": (
        convert,
        [
            _argument("adapter", "a file, a folder, a run's folder or a Hub id", metavar="ADAPTER"),
            _argument("output", "a folder, new or empty", metavar="OUTPUT", type=Path),
            _BASE,
            _ALPHA,
        ],
    ),
    "compress": (
        compress,
        [
            _argument("adapter", "a run, or a file, folder or Hub id of an adapter", metavar="ADAPTER"),
            _argument("--energy", "share of Σσ² to keep in each layer, one or several with commas (default: 0.95)",
                      type=_numbers(float), default=[0.95], metavar="E"),
            _argument("--output", "copy the adapter there (several: to energy-E below it)", type=Path, metavar="DIR"),
            _argument("--like", "the run whose base, task and settings another adapter is evaluated with",
                      metavar="RUN"),
            _BASE,
            _ALPHA,
            _RESULTS,
            _DEVICE,
            _JSON,
        ],
    ),
    "intervene": (
        intervene,
        [
            _argument("runs", "a run's id, or what it begins with; one or more", nargs="+", metavar="RUN"),
            _argument("--lambdas", "factors of the singular values, with commas (default: 0,0.3,0.5,0.7,1,1.5)",
                      type=_numbers(float), metavar="L"),
            _argument("--epsilon", "largest |cos| of an intruder with W0's vectors (default: 0.5)",
                      type=_number(float, 0), default=0.5, metavar="E"),
            _argument("--top", "singular vectors of each matrix that are looked at (default: 10)",
                      type=_number(int, 1), default=10, metavar="K"),
            _argument("--figure", "also draw it: FILE.pdf or FILE.png, both are written", type=Path, metavar="FILE"),
            _RESULTS,
            _DEVICE,
            _JSON,
        ],
    ),
    "list": (list_plugins, [_argument("kind", "only these", nargs="?", choices=plugins.FOLDERS), _JSON]),
}  # fmt: skip


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # slow to import

        print(f"lorabench {version('lorabench')}")
        parser.exit()


def _summary(text: str) -> str:
    return text.partition("\n")[0]


def _dedent(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.strip().splitlines())


def _json(table: Any) -> str:
    return json.dumps(_finite(table), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a diverged run's loss becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _store(root: Path) -> Store:
    from lorabench.record import Store

    if not root.is_dir():
        raise InputError(f"RESULTS = {root}: no such folder")
    return Store(root)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    return name


def _share(flag: str, value: float) -> float:
    if not 0 < value <= 1:
        raise InputError(f"{flag} {value:g}: must be above 0 and at most 1")
    return value


def _adapter(source: str, arguments: argparse.Namespace) -> Adapter:
    """Opened; what its reader has to say of it is said, a guessed scale as a warning."""
    if arguments.alpha is not None and not 0 < arguments.alpha < math.inf:
        raise InputError(f"--alpha {arguments.alpha:g}: must be a number above 0")
    from lorabench.formats import open_adapter

    adapter = open_adapter(source, base=arguments.base, alpha=arguments.alpha)
    if adapter.scale_source == "assumed":
        talk(f"warning: {source}: its scale is assumed; --alpha sets it")
    for note in adapter.notes:
        talk(f"{source}: {note}")
    return adapter


def _write_page(file: Path, text: str) -> None:
    from lorabench.record import write_bytes

    write_bytes(file, text.encode())
    talk(f"wrote {file}")


def _retry(text: str) -> frozenset[Status]:
    from lorabench.launch import REPEATABLE

    names = [name.strip() for name in text.split(",") if name.strip()]
    choices = [str(status) for status in REPEATABLE]
    valid = [*choices, "all"]
    wrong = [f"--retry {name}: {plugins.unknown('status', name, valid)}" for name in names if name not in valid]
    if wrong:
        raise InputError(wrong)
    return frozenset(status for status in REPEATABLE if str(status) in names or "all" in names)


def _pool(arguments: argparse.Namespace, device: str, retry: frozenset[Status], threads: int) -> Any:
    from lorabench.launch import Pool
    from lorabench.machine import available_cores, visible_gpus
    from lorabench.worker import Settings

    gpus = visible_gpus(device)
    minutes = arguments.timeout_minutes
    settings = Settings(
        device="cuda" if gpus else "cpu",
        checkpoint_seconds=arguments.checkpoint_seconds,
        timeout_seconds=None if minutes is None else 60 * minutes,
    )
    workers = arguments.workers or len(gpus) or max(1, available_cores() // threads)
    return Pool(workers=workers, gpus=gpus, settings=settings, retry=retry)


def _draw(arguments: argparse.Namespace, again: bool) -> int:
    """Everything that is drawn from the sweeps asked for: what is not up to date, or all of it `again`."""
    from lorabench.share import WorkerFailed
    from lorabench.stamp import find_sweeps

    store = _store(arguments.results)
    for found in find_sweeps(store, arguments.sweep):
        files = None if again else found.up_to_date(store)
        try:
            files = _write(store, found.read(), arguments.workers) if files is None else files
        except WorkerFailed as error:
            for line in str(error).splitlines():
                talk(f"error: {line}")
            return 1
        for file in files:
            print(file)
    return 0


def _write(store: Store, sweep: Sweep, workers: int | None) -> list[Path]:
    """Analyze what is new, and write everything that is drawn from the sweep."""
    from lorabench.analyze import analyze as analyze_runs
    from lorabench.report import write_report
    from lorabench.results import load_results
    from lorabench.stamp import analysis_key, write_stamp
    from lorabench.terminal import count_statuses

    key = analysis_key(store, sweep.text, [spec.id for spec in sweep.runs])
    states = list(store.states(list(sweep.runs)))
    if any(state.status != "done" for state in states):
        talk(f"{sweep.name}: {count_statuses(states)}; the tables show which cells are lacking")
    compute = partial(analyze_runs, workers=workers, states=states)
    files = write_report(load_results(store, sweep, compute, states), store.root / sweep.name)
    write_stamp(store, sweep, key, files)
    return files


def _hush_libraries() -> None:
    """Leave out what libraries have to say to their own developers."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
