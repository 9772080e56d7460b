"""`lorabench.results(path)`: what a sweep has given, as frames, and as figures on one's own axes."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

    from lorabench.report.freshness import SweepFile
    from lorabench.report.results import Results
    from lorabench.spec.source import Source
    from lorabench.spec.sweep import Sweep
    from lorabench.store.store import Store


def results(path: str | os.PathLike[str] = "results", sweep: Source | None = None) -> SweepResults:
    """What a sweep has given so far: of the results folder `path`, or of a sweep's own folder there.

        results = lorabench.results("results/quickstart")
        results.runs.groupby("method.rank")["valid_loss"].mean()
        results.figure("rank_quality", ax=axes)

    `sweep`: a sweep's name there, or a sweep of one's own (a file, a text, a dict), of which the runs that are there
    count; it can be left out where there is one sweep alone. Raises `lorabench.InputError` with the choices.
    """
    store, found = find(path, sweep)
    return SweepResults(store, found)


def find(path: str | os.PathLike[str], sweep: Source | None) -> tuple[Store, Sweep | SweepFile]:
    """The results folder and the one sweep that is meant. InputError."""
    from lorabench.config.decode import InputError
    from lorabench.config.quote import show_path
    from lorabench.report.freshness import find_sweeps
    from lorabench.spec.source import as_sweep
    from lorabench.store.store import Store

    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"RESULTS = {show_path(folder)}: no such folder")
    if sweep is None and (folder / "sweep.toml").is_file() and not (folder / "runs").is_dir():
        folder, sweep = folder.absolute().parent, folder.absolute().name
    store = Store(folder)
    if sweep is not None and (not isinstance(sweep, str) or "\n" in sweep):
        return store, as_sweep(sweep)
    sweeps = find_sweeps(store, sweep)
    if len(sweeps) > 1:
        names = ", ".join(str(found.default_name) for found in sweeps)
        raise InputError(f"sweep: is missing, and {show_path(folder)} holds several: {names}")
    return store, sweeps[0]


class SweepResults:
    """A sweep's results, read when they are asked for and kept; `refresh()` gives those of now.

    The frames are in long form, and have the sweep's keys as columns: numbers as numbers, texts as categories in the
    sweep's order. What needs ΔW is computed the first time, and found again in the results folder after that.
    `files`, `errors` and `unread` are set by `lorabench.analyze`: what was written, what of it raised, and the runs of
    which ΔW cannot be read, with the reason.
    """

    def __init__(self, store: Store, found: Sweep | SweepFile):
        self._store, self._found = store, found
        self.files: list[Path] = []
        self.errors: dict[str, str] = {}
        self.unread: dict[str, str] = {}

    @cached_property
    def sweep(self) -> Sweep:
        from lorabench.spec.sweep import Sweep

        return self._found if isinstance(self._found, Sweep) else self._found.read()

    @property
    def path(self) -> Path:
        """The results folder."""
        return self._store.root

    @property
    def folder(self) -> Path:
        """The sweep's own: tables, figures, report.html."""
        return self._store.root / self.sweep.name

    @property
    def whole(self) -> bool:
        """Whether nothing had to be left out of what was written."""
        return not (self.errors or self.unread)

    def refresh(self) -> SweepResults:
        return SweepResults(self._store, self._found)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row a run, done or not: the keys of its spec, `status`, `selected`, and each measure of its record."""
        from lorabench.report.frames import runs_frame

        return runs_frame(self._read)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """A row a run and step: `step`, `loss`, `grad_norm`, `step_lr`, and the metrics of periodic evaluations."""
        from lorabench.report.frames import steps_frame

        return steps_frame(self._read)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row a metric of a layer's ΔW: `analysis`, `metric`, `value`, `null` (what chance gives)."""
        from lorabench.report.frames import metrics_frame

        return metrics_frame(self.analyzed)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A row a metric of a layer of two runs that differ in one key, `axis`; other keys are those of run a."""
        from lorabench.report.frames import pairs_frame

        return pairs_frame(self.analyzed)

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """A row a singular value of a layer's ΔW: `index` from 1, `value`, `null`."""
        from lorabench.report.frames import spectra_frame

        return spectra_frame(self.analyzed)

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The verdicts on the sweep's claims, as `lorabench.analyze` has written them last."""
        from lorabench.report.claims import read

        return read(self.folder / "tables")

    def figure(
        self, name: str, *, ax: Axes | None = None, fig: FigureBase | None = None, **options: Any
    ) -> Figure | FigureBase:
        """Draw a figure of the report: on one's own axes, in one's own figure or subfigure, or as a new one.

            figure, (left, right) = plt.subplots(1, 2)
            results.figure("rank_quality", ax=left)
            results.figure("depth_profile", ax=right, kinds=["q_proj"])

        `options` are its keys in a sweep file (`lorabench list figures`); where there are none, those of the sweep's
        own figure of that name hold. Raises InputError where it has nothing to draw, and where it has several panels
        and is given axes.
        """
        from lorabench.config.decode import InputError
        from lorabench.report import drawing
        from lorabench.report.labels import losses_of

        if ax is not None and fig is not None:
            raise InputError("fig: not beside ax")
        figure, canvas = self._figure(name, options), ax if ax is not None else fig
        with losses_of(self.sweep.runs):
            if canvas is None:
                drawn = figure.draw(self.analyzed.of(figure.where))
                if drawn is not None:
                    drawing.finish(drawn)
            else:
                with drawing.onto(canvas):
                    drawn = figure.draw(self.analyzed.of(figure.where))
        if drawn is None:
            which = "these results" if not figure.where else "the part of these results that `where` names"
            raise InputError(f"figure {name}: there is nothing to draw in {which}: it needs {figure.needs}")
        return drawn

    def _figure(self, name: str, options: dict[str, Any]) -> Any:
        from lorabench.config.decode import InputError, decode_plugin
        from lorabench.config.toml_text import plain
        from lorabench.spec.figure import Figure
        from lorabench.spec.known import known_measures, unknown_measures, unknown_runs

        own = [figure for figure in self.sweep.figures if figure.name == name]
        if own and not options:
            return own[0]
        figure = decode_plugin(Figure, {"name": name, **plain(options, "figure")}, "figure")
        problems = unknown_measures(figure.measures, known_measures(self.sweep.runs), f"figure {name}")
        problems += unknown_runs(figure.where, self.sweep.runs, self.sweep.labels, "where", f"figure {name}: ")
        if problems:
            raise InputError(problems)
        return figure

    @cached_property
    def _read(self) -> Results:
        """What the runs' records say."""
        from lorabench.report.results import load_results

        return load_results(self._store, self.sweep)

    @cached_property
    def analyzed(self) -> Results:
        """The same with the analyses of ΔW, in the form that tables and figures are made from."""
        from lorabench.analysis.analyze import analyze
        from lorabench.report.results import load_results

        return load_results(self._store, self.sweep, analyze)

    def __repr__(self) -> str:
        from lorabench.config.quote import show_path
        from lorabench.terminal.text import count_statuses

        counts = count_statuses(self._store.states(list(self.sweep.runs)))
        return f"<lorabench results of {self.sweep.name} in {show_path(self.path)}: {counts}>"

    def _repr_html_(self) -> str:
        """The runs, their keys and the measures that tell them apart."""
        from html import escape

        shown = self._read
        keys = list(dict.fromkeys(["method.name", *shown.keys, "status"]))
        measures = [f"valid_{shown.quality}", "forgetting", "num_trainable", "peak_gib", "total_seconds"]
        frame = self.runs[[*keys, *(name for name in measures if name in self.runs)]]
        table = frame.to_html(max_rows=20, float_format="{:.4g}".format, border=0, na_rep="–")
        return f"<p>{escape(repr(self)[1:-1])}</p>{table}"
