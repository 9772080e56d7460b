"""One batch of an analysis: each layer of its runs is read and decomposed once, and given to all that ask for it.

Layers are streamed: memory holds one layer's thin SVD of each run that is still to be compared with another, and the
base's of that layer.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorabench.analysis.bases import Bases
from lorabench.analysis.cache import to_stream, write_streams
from lorabench.analysis.jobs import SNAPSHOTS, UPDATES, Job, files_of
from lorabench.analysis.tidy import Spool
from lorabench.config.decode import InputError
from lorabench.config.digests import check_files, check_listing
from lorabench.config.json_file import Unreadable
from lorabench.config.quote import blame
from lorabench.linalg.decompose import one_thread
from lorabench.store.record import RunRecord
from lorabench.store.store import WAY_OUT
from lorabench.updates import formats, parts
from lorabench.updates.base import Tuned
from lorabench.updates.gradients import FOLDER, read_gradients
from lorabench.updates.layer import LayerSVD
from lorabench.updates.readers._entry import Entry

LAYER_COLUMNS = ["layer", "kind", "depth"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one process does at a time: part `part` of `num_parts` of the parameters of batch `number`.

    Rows are kept in `scratch`, and become each run's and pair's file at once: a batch of one part ends so by itself.
    """

    jobs: list[Job]
    number: int
    part: int
    num_parts: int
    scratch: Path

    def spools(self, place: int) -> list[Spool]:
        """Where all parts of the batch put the rows of the job at `place`, in the order of the layers."""
        return [Spool(self.scratch / f"{self.number}-{place}-{part}.arrow") for part in range(self.num_parts)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`failed`: the runs that could not be read, with the reason. `broken`: the analyses that raised, with what.

    `left_out`: the jobs, by place, that have no base, or whose analysis raised.
    """

    failed: dict[str, str]
    left_out: list[int]
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compute(part: Part, bases: Bases, advance: Callable[[float], None]) -> Outcome:
    """Do the jobs on this part's layers; `advance` is told the jobs that this amounts to."""
    work = _Work(part, bases)
    try:
        work.go(advance)
        if part.num_parts == 1:
            _write(part, [work.outcome], lambda place: [work.spools[place]] if place in work.spools else [])
        else:
            for spool in work.spools.values():
                spool.save()
        return work.outcome
    except BaseException:
        for spool in work.spools.values():
            spool.remove()
        raise


def commit(part: Part, outcomes: list[Outcome]) -> None:
    """Write the files of a batch all of whose parts have been computed."""
    if part.num_parts > 1:
        _write(part, outcomes, part.spools)


def _write(part: Part, outcomes: list[Outcome], spools: Callable[[int], list[Spool]]) -> None:
    """The file of each run and pair that could be read."""
    failed = {run_id for outcome in outcomes for run_id in outcome.failed}
    left_out = {place for outcome in outcomes for place in outcome.left_out}
    of_file: defaultdict[Path, dict[Job, bytes]] = defaultdict(dict)
    for place, job in enumerate(part.jobs):
        parts = spools(place)
        if place not in left_out and not failed & {*job.runs}:
            with _blaming(outcomes[0], part, job):
                tables = (table for spool in parts for table in spool.tables())
                of_file[job.file][job] = to_stream(job.key, tables)
        for spool in parts:
            spool.remove()
        is_last = place + 1 == len(part.jobs) or part.jobs[place + 1].file != job.file
        if is_last and (streams := of_file.pop(job.file, None)):
            with _blaming(outcomes[0], part, *streams):
                write_streams(streams, part.scratch / f"{part.number}.zip")


@contextlib.contextmanager
def _blaming(outcome: Outcome, part: Part, *jobs: Job) -> Iterator[None]:
    """What raises is told of its analyses, which are left out; the others go on."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) and not jobs[0].file.is_dir():  # nothing can be written here, of no run
            raise
        for job in jobs:
            outcome.broken.setdefault(job.analysis.name, f"{', '.join(job.runs)}: {blame(error)}")
            outcome.left_out.append(part.jobs.index(job))


class _Work:
    """The state of one `compute`."""

    def __init__(self, part: Part, bases: Bases):
        self.part, self.bases = part, bases
        self.records = {record.run_id: record for job in part.jobs for record in job.records}
        self.moving = {job.records[0].run_id for job in part.jobs if job.analysis.is_over_training()}
        self.failed: dict[str, str] = {}
        left_out = [
            place
            for place, job in enumerate(part.jobs)
            if job.analysis.is_beside_base() and any(bases.find(record) is None for record in job.records)
        ]
        self.spools = {
            place: part.spools(place)[part.part] for place in range(len(part.jobs)) if place not in set(left_out)
        }
        self.outcome = Outcome(failed=self.failed, left_out=left_out)

    def go(self, advance: Callable[[float], None]) -> None:
        part = self.part
        opened = {run_id: self._open(place, run_id) for place, run_id in enumerate(self.records)}
        entries = {run_id: found for run_id, found in opened.items() if found}
        parameters = sorted({parameter for found in entries.values() for parameter in found[-1][1]})
        size = len(parameters)
        for parameter in parameters[size * part.part // part.num_parts : size * (part.part + 1) // part.num_parts]:
            self._layer(parameter, entries)
            advance(len(part.jobs) / size)

    def _open(self, place: int, run_id: str) -> list[tuple[int | None, dict[str, Entry]]]:
        """The entries of the run's snapshots by step, where they are wanted, and of its end; empty where damaged.

        Each file is held against its digest by one of the parts; each part looks that no other is there.
        """
        record, folder = self.records[run_id], self.part.jobs[0].root / "runs" / run_id
        with self._noting(run_id):
            files = files_of(record, (UPDATES, SNAPSHOTS) if run_id in self.moving else (UPDATES,))
            with _naming_the_way_out():
                check_listing(folder, files)
                if place % self.part.num_parts == self.part.part:
                    check_files(folder, files)
            steps = sorted({int(path.split("/")[1]) for path in files_of(record, (SNAPSHOTS,))})
            folders = [(step, folder / SNAPSHOTS / f"{step:06d}") for step in steps if run_id in self.moving]
            all_folders = [*folders, (None, folder / UPDATES)]
            return [(step, parts.split(formats.open_layers(at), at)) for step, at in all_folders]
        return []

    def _layer(self, parameter: str, entries: dict[str, list[tuple[int | None, dict[str, Entry]]]]) -> None:
        """The rows of one layer for every job whose runs all have it in the same shape."""
        having = {run_id for run_id, found in entries.items() if parameter in found[-1][1]}
        jobs = [(place, job) for place, job in enumerate(self.part.jobs) if place in self.spools]
        jobs = [(place, job) for place, job in jobs if having >= {*job.runs}]
        uses = Counter(run_id for _, job in jobs for run_id in job.runs)
        seen: dict[str, list[LayerSVD]] = {}
        tuned: dict[str, Tuned | None] = {}
        for place, job in jobs:
            for run_id in job.runs:
                if run_id not in seen:
                    seen[run_id] = self._load(run_id, parameter, entries[run_id])
            with _blaming(self.outcome, self.part, job):
                self._add(place, job, seen, tuned)
            for run_id in job.runs:
                uses[run_id] -= 1
                if not uses[run_id]:
                    del seen[run_id]
                    tuned.pop(run_id, None)

    def _add(self, place: int, job: Job, seen: dict[str, list[LayerSVD]], tuned: dict[str, Tuned | None]) -> None:
        """The job's rows of this layer, unless it does not apply, or has been left out by now."""
        given = self._given(job, seen, tuned) if place not in self.outcome.left_out else []
        if not given:
            return
        with one_thread():
            rows = job.analysis.compute(*given)
        if rows:
            last = seen[job.runs[0]][-1]
            self.spools[place].add(rows, {column: getattr(last, column) for column in LAYER_COLUMNS})

    def _given(self, job: Job, seen: dict[str, list[LayerSVD]], tuned: dict[str, Tuned | None]) -> list[Any]:
        """What the job's analysis is called with; empty where it does not apply to the layer."""
        if not all(seen[run_id] for run_id in job.runs):
            return []
        last = [seen[run_id][-1] for run_id in job.runs]
        if len({layer.shape for layer in last}) > 1:
            return []
        if job.analysis.is_over_training():
            steps = seen[job.runs[0]]
            if len(steps) < 2 or not job.analysis.is_beside_base():
                return steps if len(steps) > 1 else []
            found = [self._tuned(job.records[0], layer) for layer in steps]
            return found if all(each is not None for each in found) else []
        if not job.analysis.is_beside_base():
            return last
        for record, layer in zip(job.records, last, strict=True):
            if record.run_id not in tuned:
                tuned[record.run_id] = self._tuned(record, layer)
        found = [tuned[run_id] for run_id in job.runs]
        return found if all(each is not None for each in found) else []

    def _tuned(self, record: RunRecord, layer: LayerSVD) -> Tuned | None:
        return self.bases.tuned(record, layer, old_names=f"{UPDATES}/{parts.PARTS_FILE}" in record.files)

    def _load(self, run_id: str, parameter: str, entries: list[tuple[int | None, dict[str, Entry]]]) -> list[LayerSVD]:
        """The layer after each step, the end last; empty where the run is damaged."""
        if run_id in self.failed:
            return []
        with self._noting(run_id):
            loaded = [(step, formats.load_layer(found[parameter])) for step, found in entries if parameter in found]
            record = self.records[run_id]
            last: dict[str, Any]
            name = loaded[-1][1].layer
            last = {
                "step": _last_step(record),
                "drift": record.drift.get(name, {}),
                "movement": record.movement.get(name, {}),
            }
            if run_id in self.moving:
                file = self.part.jobs[0].root / FOLDER / record.provenance.get("gradients", "")
                last["gradients"] = read_gradients(file, name)
            return [replace(layer, **(last if step is None else {"step": step})) for step, layer in loaded]
        return []

    @contextlib.contextmanager
    def _noting(self, run_id: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.failed[run_id] = str(error)
        except Exception as error:  # of one run: the others are read
            self.failed[run_id] = blame(error)


def _last_step(record: RunRecord) -> int:
    spec = record.spec
    return spec["steps"] * len(spec.get("tasks") or [None])


@contextlib.contextmanager
def _naming_the_way_out() -> Iterator[None]:
    try:
        yield
    except Unreadable:  # it may be whole
        raise
    except InputError as error:
        raise InputError(f"{error}; {WAY_OUT}") from None
