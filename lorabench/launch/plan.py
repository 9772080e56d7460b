"""What a sweep will take: exact parameter counts, estimated peak memory and time, and what each estimate rests on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lorabench.config.decode import InputError, encode
from lorabench.data import fingerprints
from lorabench.launch import estimate, pack_size, packs
from lorabench.launch.estimate import BYTES, EFFICIENCY, Counts, History
from lorabench.models import base_model as models
from lorabench.models import targets, weights
from lorabench.models.remarks import remarks
from lorabench.spec.method import Method
from lorabench.spec.run_spec import UNNAMED, RunSpec, flatten, short, swept_keys
from lorabench.spec.sweep import Sweep
from lorabench.spec.task import Task
from lorabench.store.record import Status
from lorabench.store.store import RunState, Store
from lorabench.terminal.text import duration, size, text_table
from lorabench.training import flops
from lorabench.training.data_check import data_notes, data_now, data_problems, token_problems, usable_of
from lorabench.training.examples import shared_options
from lorabench.training.meter import GIB
from lorabench.training.trial import from_json, try_out

LARGEST_RANDOM = 500e6
"""Parameters of the largest model that is made of random weights to attach a method to it."""


def make_plan(
    sweep: Sweep,
    store: Store,
    device_name: str = "auto",
    gpu: str | None = None,
    packing: packs.Asked | None = None,
) -> dict[str, Any]:
    """`{"runs": [{"run_id", "spec", "done", "status", "estimate"}], "totals", "notes", "assumptions"}`.

    `gpu` names the kind that the runs will have, where this machine has none of it; `packing`: how they
    will be packed.
    InputError with every problem that shows only when a method meets the model (targets that fit no layer).
    """
    device = _device(device_name)
    states = list(store.states(list(sweep.runs)))
    counts = _count_all(sweep, states)
    history = History(store, sweep.runs, count, device, gpu)
    runs = []
    for spec, state in zip(sweep.runs, states, strict=True):
        done = state.status == Status.DONE
        runs.append(
            {
                "run_id": spec.id,
                "spec": state.spec,
                "done": done,
                "status": str(state.status),
                "estimate": _measured(state) if done else history.estimate(spec, counts[spec.id]),
            }
        )
    todo = [spec for spec, state in zip(sweep.runs, states, strict=True) if state.status != Status.DONE]
    return {
        "runs": runs,
        "totals": _totals(runs),
        "notes": [*notes(sweep.runs), *changed_data(sweep.runs, states), *_packs(todo, packing)],
        "assumptions": _assumptions(sweep, runs, device, gpu),
    }


def plan_text(sweep: Sweep, plan: dict[str, Any]) -> str:
    """One line a run, with the swept keys as columns; the totals and the assumptions come last."""
    flats = [flatten(run["spec"]) for run in plan["runs"]]
    keys = ["method.name", *swept_keys(flats)]
    rows = [
        {
            "run_id": run["run_id"],
            "status": run["status"],
            **{key: short(flat.get(key, UNNAMED.get(key))) for key in keys},
            "trainable": f"{run['estimate']['num_trainable']:,}",
            "of": f"{run['estimate']['num_parameters']:,}",
            "peak": _approximate(run["done"], size(run["estimate"]["peak_gib"] * GIB)),
            "time": _approximate(run["done"], duration(run["estimate"]["seconds"])),
            "basis": run["estimate"]["basis"],
        }
        for run, flat in zip(plan["runs"], flats, strict=True)
    ]
    totals = plan["totals"]
    lines = [text_table(rows, ["run_id", "status", *keys, "trainable", "of", "peak", "time", "basis"]), ""]
    lines.append(f"{sweep.name}: {totals['num_runs']} runs, {totals['num_done']} done, {totals['num_to_run']} to run")
    if totals["num_to_run"]:
        at_most, time = size(totals["peak_gib"] * GIB), duration(totals["seconds"])
        lines.append(f"to run: about {time} one after another, at most about {at_most} each")
    return "\n".join([*lines, *plan["notes"], *plan["assumptions"]])


def _packs(specs: Sequence[RunSpec], asked: packs.Asked | None) -> list[str]:
    """Which of the runs are computed together, and why others are not."""
    if asked is None:
        return []
    known, reasons = rides(specs, asked)
    together = packs.packs_text(packs.in_packs(specs, known, asked.workers))
    return [f"packed: {together}"] * bool(together) + reasons


def _approximate(known: bool, text: str) -> str:
    return text if known else f"~{text}"


def _count_all(sweep: Sweep, states: Sequence[RunState]) -> dict[str, Counts]:
    """InputError with every problem of the sweep; the data of runs that are done may be gone."""
    done = {state.run_id for state in states if state.status == Status.DONE}
    counts, problems = _counts_and_problems(sweep.runs, done)
    if problems:
        raise InputError(problems, sweep.name)
    return counts


def refusals(specs: Sequence[RunSpec]) -> list[str]:
    """Every problem that shows only when a method meets the model or the data, each once."""
    return _counts_and_problems(specs)[1]


def rides(specs: Sequence[RunSpec], asked: packs.Asked) -> tuple[dict[str, packs.Ride], list[str]]:
    """By run, with whom it can be computed in one pass; and why some cannot, a sentence each."""

    def know(spec: RunSpec) -> tuple[Counts, str]:
        found = _known(spec)
        if isinstance(found, InputError):
            raise found
        return found.counts, found.unfit

    return pack_size.rides(specs, know, asked, _device(asked.device))


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def notes(specs: Sequence[RunSpec]) -> list[str]:
    """What there is to say of the runs' bases, each once; of runs that can be counted."""
    found = {}
    for spec in specs:
        known = _known(spec)
        for key, text in {} if isinstance(known, InputError) else known.remarks.items():
            found[f"{spec.model}: {key}: {text}"] = True
        found |= dict.fromkeys(data_notes(spec), True)
    return list(found)


def changed_data(specs: Sequence[RunSpec], states: Sequence[RunState]) -> list[str]:
    """A sentence for each name under which runs of a sweep had, or would have, different data."""
    return fingerprints.changed(
        (spec.id, fingerprints.named(spec.stages, state.record.environment.get("data") or {}))
        if state.status == Status.DONE and state.record
        else (spec.id, data_now(spec))
        for spec, state in zip(specs, states, strict=True)
    )


def _counts_and_problems(
    specs: Sequence[RunSpec], done: Collection[str] = frozenset()
) -> tuple[dict[str, Counts], list[str]]:
    counts, problems = {}, []
    for spec in specs:
        wrong = [] if spec.id in done else data_problems(spec)
        try:
            if not wrong:
                counts[spec.id] = count(spec)
                wrong = [] if spec.id in done else token_problems(spec)
        except InputError as error:
            wrong = error.problems
        problems += wrong
    return counts, list(dict.fromkeys(problems))


def count(spec: RunSpec) -> Counts:
    """Exact counts from the model's config; no weight is loaded."""
    found = _known(spec)
    if isinstance(found, InputError):
        raise found
    models.check_length(spec, found.longest)
    return found.counts


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of runs that share a model, a method and a task."""

    counts: Counts
    longest: int | None
    """The model's longest input."""
    remarks: dict[str, str]
    unfit: str
    """Why runs on the base are not packed; see `pack_size.unfit_base`."""


def _known(spec: RunSpec) -> _Known | InputError:
    task = "tasks" if spec.tasks else "task"
    keys = ("model", "revision", "method", "optimizer", "quantization", task, "dtype", "padding")
    return _know(json.dumps({key: encode(getattr(spec, key)) for key in keys}))


@cache
def _know(key: str) -> _Known | InputError:
    spec = RunSpec.from_json(json.loads(key))
    try:
        options = shared_options([_model_options(task) for task in spec.stages])
        base: Any = models.skeleton(spec, options)
        files = _of_files(spec, options)
        base.drawn = dict.fromkeys(files.lacking)
        if not files.is_tied:
            weights.untie(base)
        about, unfit = remarks(spec, base), pack_size.unfit_base(spec, base)
        longest = models.max_length(base)
        counts = counted(spec, base, options)
        if untried := try_out(spec, options):
            about["trial"] = untried
    except InputError as error:
        return error
    return _Known(counts=counts, longest=longest, remarks=about, unfit=unfit)


def counted(spec: RunSpec, base: torch.nn.Module, options: dict[str, Any]) -> Counts:
    """Of a base without weights, to which the run's method is attached."""
    weight_bytes = _weight_bytes(spec, base)
    if spec.method.merges_as_it_goes:
        merged = sum(base.get_submodule(name).weight.numel() for name in spec.method.ranks(base))
        weight_bytes += (BYTES["float32"] - BYTES[spec.dtype]) * merged
    config: Any = base.config
    tuned = _attach(spec, base, options)
    spec.optimizer.prepare(tuned, spec)
    depth, width = _depth(config), _width(config)
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    added = 0 if spec.method.trains_base else sum(p.numel() * p.element_size() for p in trainable)
    return Counts(
        num_parameters=weights.count(tuned),
        num_trainable=sum(p.numel() for p in trainable),
        num_tensors=len(trainable),
        weight_bytes=weight_bytes + added,
        moment_bytes=4 * spec.optimizer.num_kept(tuned),
        layers=depth,
        width=width,
        inner=getattr(config, "intermediate_size", None) or 4 * width,
        vocabulary=0 if spec.task.unit == "images" or "Classification" in spec.task.auto_class else config.vocab_size,
        step_flops=_step_flops(tuned, spec.method),
        profile=_profile(tuned),
    )


def _depth(config: Any) -> int:
    """Blocks of a model, of all stages together where it has several."""
    depths = getattr(config, "depths", None)
    if isinstance(config, dict):  # a denoiser's
        whole, single = config.get("num_layers"), config.get("num_single_layers") or 0
        return whole + single if whole else 2 * len(config["block_out_channels"]) * config["layers_per_block"] + 1
    return sum(depths) if depths else int(config.num_hidden_layers)


def _width(config: Any) -> int:
    """Of a model whose stages widen, the last one's."""
    if isinstance(config, dict):
        channels = config.get("block_out_channels")
        return int(channels[-1] if channels else config["num_attention_heads"] * config["attention_head_dim"])
    return int(getattr(config, "hidden_size", None) or config.hidden_sizes[-1])


def _step_flops(tuned: torch.nn.Module, method: Method) -> Callable[[flops.Shape, int], float]:
    """Counted when they are asked for, and kept; six a parameter and position where a model cannot be counted."""

    @cache
    def skeleton() -> torch.nn.Module:
        return flops.without_numbers(tuned)

    @cache
    def of_step(shape: flops.Shape, times: int) -> float:
        try:
            return flops.of_step(skeleton(), {shape: times}, method)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            print(f"FLOPs of {type(tuned).__name__} are guessed: {error}", file=sys.stderr)
            return 6.0 * weights.count(tuned) * times * flops.num_positions(shape)

    return of_step


def _profile(tuned: torch.nn.Module) -> Callable[[flops.Shape], flops.Profile]:
    """A pass's profile when it is asked for, and kept; a guess where a model cannot be gone through."""

    @cache
    def skeleton() -> torch.nn.Module:
        return flops.without_numbers(tuned)

    @cache
    def profile(shape: flops.Shape) -> flops.Profile:
        try:
            return flops.profile(skeleton(), shape)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            print(f"what {type(tuned).__name__} computes is guessed: {error}", file=sys.stderr)
            config: Any = tuned.config
            positions = flops.num_positions(shape)
            written = 4.0 * positions * _depth(config) * 30 * _width(config)
            forward = flops.Cost(
                flops=2.0 * weights.count(tuned) * positions,
                written=written,
                operations=60.0 * _depth(config),
            )
            return flops.Profile(forward=forward, both=forward * 3, kept=written)

    return profile


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What a base's files say that its configuration does not."""

    lacking: tuple[str, ...]
    is_tied: bool
    """Whether the output matrix is the input embedding; of a Flan-T5 it is none, whose configuration reads as if."""


def _of_files(spec: RunSpec, options: dict[str, Any]) -> _Files:
    """InputError where they, or the base's tokenizer, do not fit the model. What reads images ties nothing."""
    keys = ("model", "revision", "tasks" if spec.tasks else "task")
    found = _look(json.dumps({key: encode(getattr(spec, key)) for key in keys}), json.dumps(options))
    if isinstance(found, InputError):
        raise found
    return found


@cache
def _look(key: str, options: str) -> _Files | InputError:
    spec = RunSpec.from_json(json.loads(key) | {"method": {"name": "head"}})
    try:
        base: Any = models.from_files(spec, from_json(options))
        if spec.task.unit == "tokens":
            models.padding(spec, base)
    except InputError as error:
        return error
    output = base.get_output_embeddings() if spec.task.unit == "tokens" else None
    return _Files(
        lacking=tuple(base.drawn), is_tied=output is None or output.weight is base.get_input_embeddings().weight
    )


def _attach(spec: RunSpec, base: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    """The method on a model without weights; where it computes on them as it is attached, on random ones."""
    try:
        with torch.device("meta"):
            return spec.method.attach(base, spec)
    except (RuntimeError, NotImplementedError) as error:
        if sum(p.numel() for p in base.parameters()) > LARGEST_RANDOM:
            key = f'method.name = "{spec.method.name}"'
            raise InputError(f"{key}: cannot be counted on so large a model without its weights: {error}") from None
        with torch.random.fork_rng():
            random = models.skeleton(spec, options, torch.device("cpu"))
            return spec.method.attach(random, spec)


def _model_options(task: Task) -> dict[str, Any]:
    if type(task).model_options is Task.model_options:
        return {}
    usable = usable_of(task)
    if isinstance(usable, InputError):
        raise usable
    return usable.options


def _weight_bytes(spec: RunSpec, base: torch.nn.Module) -> float:
    exact = BYTES["float32" if spec.method.trains_base else spec.dtype]
    total = exact * sum(p.numel() for p in base.parameters())
    if spec.quantization == "none":
        return total
    quantized = sum(next(module.parameters()).numel() for module in targets.quantized_layers(base).values())
    return total - (exact - BYTES[spec.quantization]) * quantized


def _measured(state: RunState) -> dict[str, Any]:
    assert state.record is not None
    measures = state.record.measures
    keys = ("num_parameters", "num_trainable", "updates_bytes", "peak_gib")
    found: dict[str, Any] = {key: measures.get(key, 0) for key in keys}
    found |= {"seconds": measures.get("total_seconds", 0.0)}
    return found | {"basis": "measured", "num_similar": 0}


def _totals(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what is still to run; `seconds` one after another, `peak_gib` of the largest."""
    todo = [run["estimate"] for run in runs if not run["done"]]
    return {
        "num_runs": len(runs),
        "num_done": len(runs) - len(todo),
        "num_to_run": len(todo),
        "seconds": sum(estimate["seconds"] for estimate in todo),
        "peak_gib": max((estimate["peak_gib"] for estimate in todo), default=0.0),
    }


def _assumptions(sweep: Sweep, runs: list[dict[str, Any]], device: torch.device, gpu: str | None = None) -> list[str]:
    """What the estimates rest on, one sentence each."""
    bases = {run["estimate"]["basis"] for run in runs}
    lines = []
    if "formula" in bases:
        kinds = dict.fromkeys((spec.dtype, spec.threads) for spec in sweep.runs)
        share = EFFICIENCY["cuda" if device.type == "cuda" else "cpu"]
        for rate, source in (estimate.flop_rate(device, *kind, gpu) for kind in kinds):
            lines.append(f"formula: training at {share:.0%} of {rate / 1e12:.3g} TFLOP/s ({source})")
        lines.append(
            "formula: time and memory from the shapes of what is computed, and from the lengths of the examples"
        )
        if any(task.generation for spec in sweep.runs for task in spec.stages):
            lines.append("formula: every answer is taken to be as long as it may be")
        left_out = dict.fromkeys(spec.objective.not_estimated(spec) for spec in sweep.runs)
        lines += [f"formula: {what} is neither in the time nor in the memory" for what in left_out if what]
    if "similar runs" in bases:
        what = "of each part, that the finished runs of this model have shown which are nearest in size"
        lines.append(f"similar runs: the formula times the median ratio {what}")
    return lines
