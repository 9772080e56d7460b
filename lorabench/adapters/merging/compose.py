"""Several runs' LoRA adapters merged into one, and what it can do: on every run's task, beside base and adapters alone.

    results/merges/<id>/record.json      one a body (base, adapter or merge); <id> is the hash of all that it depends on

PEFT's `add_weighted_adapter` merges, or `task_vectors` the updates. Shapes:
ΔW_i = s_i B_i A_i of run i, with B_i (M, r_i), A_i (r_i, N), weights w_i.
A classification run trains a head of its own: each task is evaluated with the head of its run on whichever body.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.merging.adapters import Adapter
from lorabench.adapters.merging.bodies import ADAPTER, BASE, FACTOR_WISE, MERGED, OF_UPDATES, Body
from lorabench.adapters.merging.task_vectors import merged_updates
from lorabench.config.decode import InputError, encode
from lorabench.config.durable import write_json
from lorabench.config.json_file import read_json
from lorabench.methods._peft import PeftMethod, tuner_layers
from lorabench.models import base_model
from lorabench.processes.distributed import pick_device
from lorabench.spec.run_spec import canonical_json, task_names
from lorabench.store.store import Store
from lorabench.training import environment
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import Examples, prepare_stages

VERSION = 2
"""Part of every id: raise it when a merge or its evaluation changes."""


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
        distinct.setdefault(_task_of(adapter), adapter)
    chosen = list(distinct.values())
    names = task_names([encode(adapter.spec.stages[-1]) for adapter in chosen])
    return [
        Column(name=f"{name} [{adapter.record.run_id}]" if names.count(name) > 1 else name, adapter=adapter)
        for name, adapter in zip(names, chosen, strict=True)
    ]


def own_columns(adapters: Sequence[Adapter]) -> list[int]:
    """For each run, which of the columns is its own task."""
    tasks = [_task_of(adapter) for adapter in adapters]
    distinct = list(dict.fromkeys(tasks))
    return [distinct.index(task) for task in tasks]


def _task_of(adapter: Adapter) -> tuple[Any, ...]:
    own = adapter.record.run_id if adapter.head else None
    return adapter.spec.stages[-1], adapter.spec.seq_len, own


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
        base = base_model.load_base(spec, self.device, self.columns[0].examples.model_options)
        if isinstance(spec.method, PeftMethod):
            spec.method.prepare(base)
        tuned: Any = None
        for index, adapter in enumerate(self.adapters):
            name = run_name(index)
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
        if body.by == BASE:
            with self.model.disable_adapter():
                return self._on_all_tasks()
        if body.by == ADAPTER:
            (number,) = [i for i, adapter in enumerate(self.adapters) if adapter.record.run_id == body.run_id]
            self.model.set_adapter(run_name(number))
            return self._on_all_tasks()
        with self.merged(body):
            return self._on_all_tasks()

    @contextmanager
    def merged(self, body: Body) -> Iterator[Any]:
        """The model with the merge active inside, under the name `merged`."""
        names = [run_name(number) for number in range(len(self.adapters))]
        merge(self.model, names, body)
        try:
            self.model.set_adapter(MERGED)
            yield self.model
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
    own = body.by in OF_UPDATES  # of which PEFT makes the place
    torch.manual_seed(body.seed or 0)
    try:
        tuned.add_weighted_adapter(
            names, list(body.weights or ()), MERGED, combination_type="cat" if own else body.by, svd_rank=body.rank,
            svd_full_matrices=False, density=body.density,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--by {body.by}: PEFT refuses it: {error}") from error
    if body.by == "cat":
        _concatenate(tuned, names, body.weights or ())
    elif own:
        _put_updates(tuned, names, body)


def _put_updates(tuned: Any, names: Sequence[str], body: Body) -> None:
    """The merge of the updates, in place of the concatenation that PEFT has made."""
    layers = dict(tuner_layers(tuned))
    pairs = {name: [flat_factors(layer, run, layer.scaling[run]) for run in names] for name, layer in layers.items()}
    for name, (B, A) in merged_updates(pairs, body):
        old_B, old_A = factors_of(layers[name], MERGED)
        old_B.data = B.reshape(*B.shape, *old_B.shape[2:]).to(old_B.device)
        old_A.data = A.reshape(len(A), *old_A.shape[1:]).to(old_A.device)


def _concatenate(tuned: Any, names: Sequence[str], weights: Sequence[float]) -> None:
    """Again in the factors' own float32: PEFT has rounded them to the base's dtype."""
    for _, layer in tuner_layers(tuned):
        pairs = [factors_of(layer, name) for name in names]
        scales = [weight * layer.scaling[name] for weight, name in zip(weights, names, strict=True)]
        B, A = factors_of(layer, MERGED)
        B.data = torch.cat([pair[0].data for pair in pairs], 1)
        A.data = torch.cat([scale * pair[1].data for scale, pair in zip(scales, pairs, strict=True)])


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """B and A of one of a layer's adapters, as PEFT has them, without the scale."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def flat_factors(layer: Any, adapter: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """B (M, r) times `scale` and A (r, N), of a convolution too; float32, on the CPU."""
    B, A = (factor.detach().float().flatten(1).cpu() for factor in factors_of(layer, adapter))
    return scale * B, A


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


def run_name(number: int) -> str:
    """PEFT's name of a run's adapter in the bench."""
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
