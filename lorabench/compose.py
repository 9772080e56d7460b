"""Several runs' LoRA adapters merged into one, and what it can do: on every run's task, beside base and adapters alone.

    results/merges/<id>/record.json      one a body (base, adapter or merge); <id> is the hash of all that it depends on

PEFT's `add_weighted_adapter` merges. Shapes: ΔW_i = s_i B_i A_i of run i, with B_i (M, r_i), A_i (r_i, N), weights w_i.
A classification run trains a head of its own: each task is evaluated with the head of its run on whichever body.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench import environment, model
from lorabench.aggregate import interval, number, places, plain
from lorabench.decode import InputError, encode
from lorabench.examples import Examples, prepare_stages
from lorabench.execute import pick_device
from lorabench.methods._peft import PeftMethod
from lorabench.plugins import unknown
from lorabench.record import RunRecord, Status, Store, file_digests, read_json, write_json
from lorabench.spec import RunSpec, canonical_json, task_names
from lorabench.terminal import text_table
from lorabench.train import metrics_of
from lorabench.update import INITIAL_FILE

VERSION = 1
"""Part of every id: raise it when a merge or its evaluation changes."""
FACTOR_WISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations of A and of B apart."""
COMBINATIONS = (*FACTOR_WISE, "cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""PEFT's `combination_type`; `lorabench merge --help` says what each computes."""
BASE, ADAPTER, MERGED = "base", "adapter", "merged"


@dataclass(frozen=True, kw_only=True)
class Body:
    """What is evaluated: the base (`by = "base"`), one run's adapter (`"adapter"`), or a merge of all of them.

    Only what `by` depends on is set, so that equal bodies have equal ids.
    """

    by: str
    run_id: str | None = None
    weights: tuple[float, ...] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        """`ties (density 0.5)`; the seed apart."""
        details = [f"{key} {getattr(self, key):g}" for key in ("density", "rank") if getattr(self, key) is not None]
        if self.weights and len(set(self.weights)) > 1:
            details.insert(0, "weights " + ":".join(f"{weight:g}" for weight in self.weights))
        name = self.run_id or self.by
        return f"{name} ({', '.join(details)})" if details else name


def bodies(
    run_ids: Sequence[str], by: Sequence[str], weights: Sequence[float], density: float, rank: int | None,
    seeds: Sequence[int],
) -> list[Body]:  # fmt: skip
    """The base, each adapter, and each merge (DARE: one a seed). InputError for what no merge can be made of."""
    problems = [f"--by {name}: {unknown('combination', name, list(COMBINATIONS))}"
                for name in by if name not in COMBINATIONS]  # fmt: skip
    if len(set(run_ids)) < 2 or len(set(run_ids)) < len(run_ids):
        problems.append(f"RUN = {' '.join(run_ids)}: needs at least two runs, each once")
    if len(weights) != len(run_ids):
        problems.append(f"--weights {','.join(map(str, weights))}: must be {len(run_ids)}, one a run")
    if not 0 < density <= 1:
        problems.append(f"--density {density:g}: must be above 0 and at most 1")
    if problems:
        raise InputError(problems)
    merges = [
        Body(
            by=name,
            weights=tuple(weights),
            density=None if name in ("linear", "cat", "svd") else density,
            rank=rank if name.endswith("svd") else None,
            seed=seed if name.startswith("dare") else None,
        )
        for name in by
        for seed in (seeds if name.startswith("dare") else seeds[:1])
    ]
    return [Body(by=BASE), *(Body(by=ADAPTER, run_id=run_id) for run_id in run_ids), *merges]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A run's LoRA adapter as it is on disk."""

    record: RunRecord
    spec: RunSpec
    folder: Path
    config: Any
    """PEFT's LoraConfig."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(self.folder / "adapter_model.safetensors").items()}

    @property
    def factors(self) -> dict[str, Tensor]:
        """By PEFT's names: A (r, N) and B (M, r)."""
        return {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}

    @property
    def head(self) -> dict[str, Tensor]:
        """The trained task head, by its names in the base; empty for a language model."""
        prefix = "base_model.model."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if ".lora_" not in name}

    @property
    def ranks(self) -> dict[str, int]:
        """Name of the A factor -> its rank."""
        return {
            name: len(tensor) for name, tensor in self.factors.items() if ".lora_A." in name or "embedding_A" in name
        }


def read_adapter(store: Store, given: str) -> Adapter:
    """The adapter of the run whose id begins so. InputError where there is none, or none that can be merged."""
    from peft import PeftConfig

    run_id = find_run(store, given)
    state, folder = store.state(run_id), store.folder(run_id) / "updates"
    if state.status != Status.DONE or state.record is None:
        raise InputError(f"RUN = {run_id}: is {state.status}, not done")
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"RUN = {run_id}: has kept no adapter")
    if file_digests(folder, folder.parent) != state.record.updates:
        raise InputError(f"RUN = {run_id}: its files are not those that its record describes")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise InputError(f"RUN = {run_id}: is {config.peft_type.value}; PEFT merges LoRA adapters alone")
    if config.use_dora:
        raise InputError(f"RUN = {run_id}: is DoRA, whose learned norms no combination merges")
    if (folder / INITIAL_FILE).exists():
        raise InputError(
            f"RUN = {run_id}: is LoftQ, whose factors also make up for quantization: each would do it anew"
        )
    return Adapter(record=state.record, spec=RunSpec.from_json(state.spec), folder=folder, config=config)


def find_run(store: Store, given: str) -> str:
    """The one run whose id is, or begins with, `given`."""
    ids = store.run_ids()
    found = [given] if given in ids else [run_id for run_id in ids if run_id.startswith(given)]
    if not given or len(found) != 1:
        which = f"{len(found)} runs begin so: {', '.join(found[:4])}" if found else unknown("run", given, ids)
        raise InputError(f"RUN = {given}: {which}")
    return found[0]


def check(adapters: Sequence[Adapter], wanted: Sequence[Body]) -> None:
    """InputError with every reason why these adapters cannot be merged so."""
    problems = []
    first = adapters[0]
    for other in adapters[1:]:
        both = f"{first.record.run_id} and {other.record.run_id}"
        differing = [key for key, value in _base_of(first).items() if _base_of(other)[key] != value]
        problems += [f"RUN = {both}: have not the same base: {', '.join(differing)} differ"] if differing else []
        if first.ranks.keys() != other.ranks.keys():
            problems.append(f"RUN = {both}: are not on the same layers (method.targets)")
        elif first.ranks != other.ranks:
            problems += [
                f"--by {body.by}: sums factors, which needs one rank, and {both} have {_span(first)} and {_span(other)}"
                "; cat and those that end in svd do not"
                for body in wanted
                if body.by in FACTOR_WISE
            ]
    if problems:
        raise InputError(list(dict.fromkeys(problems)))


def _base_of(adapter: Adapter) -> dict[str, Any]:
    spec, seen = adapter.spec, adapter.record.environment
    keys = {key: getattr(spec, key) for key in ("model", "revision", "quantization", "dtype")}
    weights = {key: seen.get(key) for key in ("model_commit", "model_sha256")}
    return keys | weights | {"kind of task": spec.task.auto_class}


def _span(adapter: Adapter) -> str:
    return "-".join(str(rank) for rank in sorted({min(adapter.ranks.values()), max(adapter.ranks.values())}))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A task to evaluate on, and the run whose head and settings it is evaluated with."""

    name: str
    adapter: Adapter

    @property
    def examples(self) -> Examples:
        return prepare_stages(self.adapter.spec)[-1]


def columns(adapters: Sequence[Adapter]) -> list[Column]:
    """The runs' tasks (of a sequence, the last), each once; with a head, one a run."""
    distinct: dict[Any, Adapter] = {}
    for adapter in adapters:
        own = adapter.record.run_id if adapter.head else None
        distinct.setdefault((adapter.spec.stages[-1], adapter.spec.seq_len, own), adapter)
    chosen = list(distinct.values())
    names = task_names([encode(adapter.spec.stages[-1]) for adapter in chosen])
    return [
        Column(name=f"{name} [{adapter.record.run_id}]" if names.count(name) > 1 else name, adapter=adapter)
        for name, adapter in zip(names, chosen, strict=True)
    ]


class Bench:
    """One base with all adapters on it; bodies are made and evaluated in turn. Loaded when first used."""

    def __init__(self, adapters: Sequence[Adapter], device: torch.device):
        self.adapters, self.device, self.columns = adapters, device, columns(adapters)

    @cached_property
    def model(self) -> Any:
        """PEFT's model with adapter i under the name `run_i`, its factors in float32, without the runs' heads."""
        from dataclasses import replace

        from peft import PeftModel, set_peft_model_state_dict

        spec = self.adapters[0].spec
        torch.set_num_threads(spec.threads)
        base = model.load_base(spec, self.device, self.columns[0].examples.model_options)
        if isinstance(spec.method, PeftMethod):
            spec.method.prepare(base)
        tuned: Any = None
        for index, adapter in enumerate(self.adapters):
            name = _name(index)
            # Not as SEQ_CLS: PEFT refuses to merge adapters of which more than one has the head in modules_to_save.
            config = replace(adapter.config, task_type=None, modules_to_save=None, inference_mode=True)
            if tuned is None:
                tuned = PeftModel(base, config, name, autocast_adapter_dtype=False)
            else:
                tuned.add_adapter(name, config, autocast_adapter_dtype=False)
            _to_float32(tuned, name)
            set_peft_model_state_dict(tuned, adapter.factors, adapter_name=name)
        for config in tuned.peft_config.values():
            config.use_rslora = False  # a merge inherits it, and would be multiplied by √r though its scale is in it
            config.init_lora_weights = True  # a merge begins at zero, whatever the runs began at
        return tuned

    def evaluate(self, body: Body) -> list[dict[str, float]]:
        """Validation metrics on each column."""
        names = [_name(number) for number in range(len(self.adapters))]
        if body.by == BASE:
            with self.model.disable_adapter():
                return self._on_all_tasks()
        if body.by == ADAPTER:
            (number,) = [i for i, adapter in enumerate(self.adapters) if adapter.record.run_id == body.run_id]
            self.model.set_adapter(names[number])
            return self._on_all_tasks()
        merge(self.model, names, body)
        try:
            self.model.set_adapter(MERGED)
            return self._on_all_tasks()
        finally:
            self.model.set_adapter(names[0])
            self.model.delete_adapter(MERGED)

    def _on_all_tasks(self) -> list[dict[str, float]]:
        found = []
        for column in self.columns:
            put_head(self.model.get_base_model(), column.adapter.head)
            found.append(metrics_of(self.model, column.adapter.spec, column.examples, "validation"))
        return found


def merge(tuned: Any, names: list[str], body: Body) -> None:
    """Add the merge under the name `merged`. DARE draws from the body's own seed."""
    torch.manual_seed(body.seed or 0)
    try:
        tuned.add_weighted_adapter(
            names, list(body.weights or ()), MERGED, combination_type=body.by, svd_rank=body.rank,
            svd_full_matrices=False, density=body.density,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--by {body.by}: PEFT refuses it: {error}") from error


def put_head(base: nn.Module, head: dict[str, Tensor]) -> None:
    """Give a classifier the head of another run, of whatever number of classes."""
    for name, tensor in head.items():
        parameter = base.get_parameter(name)
        parameter.data = tensor.to(parameter.device)


def _to_float32(tuned: nn.Module, name: str) -> None:
    """PEFT makes factors in the base's dtype; merges of bfloat16 ones would round at every step."""
    for key, parameter in tuned.named_parameters():
        if ".lora_" in key and name in key.split("."):
            parameter.data = parameter.data.float()


def _name(number: int) -> str:
    return f"run_{number}"


def compose(
    store: Store, adapters: Sequence[Adapter], wanted: Sequence[Body], device: str, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The record of each body; those that are there already are read."""
    check(adapters, wanted)
    bench = Bench(adapters, pick_device(device))
    records = []
    for position, body in enumerate(wanted, 1):
        key = _key(adapters, body)
        merge_id = f"{body.by}-{hashlib.sha256(canonical_json(key)).hexdigest()[:12]}"
        file = store.root / "merges" / merge_id / "record.json"
        record = _read(file, key)
        if record is None:
            note(f"[{position}/{len(wanted)}] {body.label}" + (f", seed {body.seed}" if body.seed is not None else ""))
            record = {"merge_id": merge_id, "key": key, "tasks": [column.name for column in bench.columns]}
            record["metrics"] = bench.evaluate(body)
            seen = adapters[0].record.environment
            weights = {name: seen[name] for name in ("model_commit", "model_sha256") if name in seen}
            record["environment"] = environment.describe(bench.device) | weights
            write_json(file, record)
        records.append(record)
    return records


def _key(adapters: Sequence[Adapter], body: Body) -> dict[str, Any]:
    """All that a body's numbers depend on."""
    runs = [
        {"run_id": a.record.run_id, "files": a.record.updates, "data": a.record.environment.get("data")}
        for a in adapters
    ]  # fmt: skip
    return {"version": VERSION, "runs": runs, "body": {**asdict(body), "weights": list(body.weights or ())}}


def _read(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The record that was kept, if it is whole and of this content."""
    try:
        record = read_json(file)
    except InputError:
        return None
    whole = record is not None and record.get("key") == key and {"tasks", "metrics", "environment"} <= record.keys()
    return record if whole else None


def metric_shown(records: Sequence[dict[str, Any]]) -> str:
    """`valid_accuracy` where every task has it, else `valid_loss`."""
    cells = [cell for record in records for cell in record["metrics"]]
    return "valid_accuracy" if all("valid_accuracy" in cell for cell in cells) else "valid_loss"


def merge_text(records: Sequence[dict[str, Any]], wanted: Sequence[Body]) -> str:
    """Bodies by tasks; DARE's seeds as mean ± 95% interval."""
    name = metric_shown(records)
    factor, unit = (100, "%") if name == "valid_accuracy" else (1, "nats")
    heads = records[0]["tasks"]
    rows = []
    for label, group in _by_label(records, wanted):
        values = [[factor * record["metrics"][i][name] for record in group] for i in range(len(heads))]
        rows.append({"body": label} | {head: _cell(column) for head, column in zip(heads, values, strict=True)})
    measure = f"{name} ({unit})"
    return "\n".join([f"{measure}, by body and task", text_table(rows, ["body", *heads])])


def _by_label(records: Sequence[dict[str, Any]], wanted: Sequence[Body]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    pairs = zip(records, wanted, strict=True)
    for label, group in itertools.groupby(pairs, key=lambda pair: pair[1].label):
        yield label, [record for record, _ in group]


def _cell(values: list[float]) -> str:
    mean, half = interval(values)
    if not half:
        return plain(mean)
    return f"{number(mean, places(half))} ± {number(half, places(half))}"
