"""One run, explained by one file: everything that can change its numbers, and nothing that cannot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from lorabench.config.decode import Pattern, decode, encode, later
from lorabench.config.plugins import example
from lorabench.config.quote import clip
from lorabench.spec.method import Method
from lorabench.spec.objective import Objective
from lorabench.spec.optimizer import Optimizer
from lorabench.spec.task import LanguageModeling, Task

Keep = Annotated[str, Pattern(r"updates|none|svd:[1-9][0-9]*", '"updates", "none" or "svd:K" (K at least 1)')]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run. Its id is the content hash of these fields: the same cell is never computed twice."""

    method: Method
    task: Task = None  # type: ignore[assignment]  # the first of `tasks` where those are given instead
    tasks: tuple[Task, ...] = ()
    """Instead of `task`: tasks that are trained one after another, each for `steps` steps, weights carrying over."""
    model: str = "builtin:tiny-llama"
    """Hub id, local folder, or `builtin:NAME`."""
    revision: str | None = None
    """Hub branch, tag or commit; the record holds the commit that was loaded."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of the frozen base, through bitsandbytes; nf4 with double quantization. LoRA on nf4 is QLoRA."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of computation (autocast) and of frozen base weights. Base weights that are trained are held in float32."""
    seq_len: Annotated[int, Ge(2)] = 128
    """Longest example, in tokens."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Examples per optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Ge(1)] | None = None
    """Examples per forward pass; gradients are accumulated up to `batch_size` (None: all at once)."""
    padding: Literal["longest", "free"] = later("longest")
    """Of a pass's examples: to the `longest` of them, or `free` of it, laid end to end, each attending to itself alone.
    The same losses, but for rounding, of language models that can tell examples apart so."""
    objective: Objective = later(factory=lambda: example("objectives", "supervised"))  # noqa: RUF009
    """What is trained for: the data's own answers, or a reward for the model's."""
    optimizer: Optimizer = later(factory=lambda: example("optimizers", "adamw"))  # noqa: RUF009
    """How gradients become steps; `lr`, `schedule`, `clip` and, where it has them, the keys from `weight_decay` to
    `epsilon` are its own."""
    steps: Annotated[int, Ge(1)] = 200
    """Optimizer steps, of each task."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Of the learning rate after warm-up; linear and cosine end at zero."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the steps in which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    epsilon: Annotated[float, Gt(0)] = 1e-8
    clip: Annotated[float, Gt(0)] | Literal["none"] = 1.0
    """Largest global norm of the gradient."""
    gradient_checkpointing: bool = False
    eval_every: Annotated[int, Ge(1)] | None = None
    """Validate after every so many steps (None: only before and after training)."""
    keep: Keep = "updates"
    """What is kept of ΔW: `updates` (adapter, or full ΔW), `svd:K` (its K top singular vectors) or `none`."""
    snapshot_every: Annotated[int, Ge(1)] | None = later(None)
    """Keep ΔW, in the form of `keep`, after every so many steps over all tasks too (None: only at the end)."""
    serving: bool = True
    """After training, measure inference of base, unmerged and merged model, and what loading and swapping take."""
    threads: Annotated[int, Ge(1), Le(1024)] = 1
    """CPU threads of a run. The order of a floating-point sum depends on it, so it is part of the spec."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Of data order, initialization and dropout."""

    def __post_init__(self) -> None:
        if self.tasks and self.task not in (None, self.tasks[0]):
            raise ValueError("tasks: stand instead of task, not beside it")
        if not self.stages:
            raise ValueError("task: is missing")
        object.__setattr__(self, "task", self.stages[0])
        problems = [*self.method.problems(self), *self._task_problems(), *self.objective.problems(self)]
        problems += self.optimizer.problems(self)
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            problems.append(f"micro_batch_size = {self.micro_batch_size}: must divide batch_size = {self.batch_size}")
        if self.snapshot_every and self.keep == "none":
            key = f"snapshot_every = {self.snapshot_every}"
            problems.append(f'{key}: keep = "none" keeps nothing of ΔW; use keep = "updates" or "svd:K"')
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def stages(self) -> tuple[Task, ...]:
        """What is trained one after another: `tasks`, or the one `task`."""
        return self.tasks or ((self.task,) if self.task is not None else ())

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all tasks."""
        return self.steps * len(self.stages)

    def _task_problems(self) -> Iterator[str]:
        for number, task in enumerate(self.stages, 1):
            yield from (in_stage(problem, number, self.tasks) for problem in task.problems(self))
        for number, task in enumerate(self.stages, 1):
            if self.padding == "free" and (not isinstance(task, LanguageModeling) or task.sequences != ("input_ids",)):
                what = "pads what it reads" if isinstance(task, LanguageModeling) else "has a label an example"
                reason = f'task.name = "{task.name}" {what}; use padding = "longest"'
                yield in_stage(
                    f'padding = "free": only next tokens can be predicted so, and {reason}', number, self.tasks
                )
        for number, task in enumerate(self.stages[:-1], 1):
            if task.generation:
                yield f"tasks {number}: task.generate: only the last task's prompts are written to; leave it out"
        kinds = dict.fromkeys(task.auto_class for task in self.stages)
        if len(kinds) > 1:
            names = ", ".join(task.name for task in self.stages)
            yield f"tasks = {names}: one model cannot do them all, for they need {' and '.join(kinds)}"

    @cached_property
    def id(self) -> str:
        """`<method>-<first 12 hex digits of the SHA-256 of the canonical JSON>`."""
        return spec_id(self.to_json())

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The keys of sweep files and the columns of tables, as `flatten` gives them; not to be changed."""
        return flatten(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Holds `task` or `tasks`, never both. The lists in it are not to be changed."""
        return {key: dict(value) if isinstance(value, dict) else value for key, value in self._encoded.items()}

    @cached_property
    def _encoded(self) -> dict[str, Any]:
        left_out = "task" if self.tasks else "tasks"
        return {key: value for key, value in encode(self).items() if key != left_out}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> RunSpec:
        """Raises InputError with every problem of the table."""
        return decode(cls, table)


def in_stage(problem: str, number: int, tasks: tuple[Task, ...]) -> str:
    """`tasks 2: task.data = ...`: which task of a sequence has the problem; as it is where there is no sequence."""
    return f"tasks {number}: {problem}" if tasks else problem


def spec_id(table: dict[str, Any]) -> str:
    """The id of the spec in a JSON table, without decoding it: quick, and right for specs of older versions too."""
    return f"{table['method']['name']}-{hashlib.sha256(canonical_json(table)).hexdigest()[:12]}"


def canonical_json(table: dict[str, Any]) -> bytes:
    """One byte string per content: sorted keys, no spaces, and 1.0 written as 1 wherever it is equal to it."""
    return json.dumps(_canonical(table), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"method": {"rank": 4}}` -> `{"method.rank": 4}`: the keys of sweep files and the columns of tables.

    A table with keys that are no plain words (a LoRA `rank_pattern` of regular expressions) is a value.
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and all(map(str.isidentifier, value)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


UNNAMED = {"objective.name": "supervised", "optimizer.name": "adamw"}
"""What runs have that do not name them, for these keys came later: in tables and claims they are told."""


def swept_keys(flats: list[dict[str, Any]]) -> list[str]:
    """The keys of which the runs that have them have different values, the method's name apart: what labels show.

    And those that like runs have and lack, as `complete` finds them; the objective, which supervised runs do not name,
    and the optimizer, which those of AdamW do not.
    """
    values: dict[str, set[str]] = {}
    for flat in flats:
        for key, value in flat.items():
            values.setdefault(key, set()).add(repr(value))
    for key, name in UNNAMED.items():
        if not all(key in flat for flat in flats):
            values.get(key, set()).add(repr(name))
    several = [key for key, found in values.items() if len(found) > 1]
    return [key for key in complete(several, flats, ["seed"]) if key != "method.name"]


def complete(keys: Iterable[str], flats: Sequence[dict[str, Any]], free: Collection[str] = ()) -> list[str]:
    """The keys, and as many others as are needed for runs that share these to differ in nothing but what is `free`.

    Of two runs of LoRA one has an `alpha_pattern` or names its `layers`, the other does not: such a key has one value
    among the runs that have it, and yet tells them apart. And the name of a bridge to others (`peft`, `torch`) says
    little without their `type`.
    """
    known = dict.fromkeys(keys)
    types = [key.removesuffix("name") + "type" for key in ("method.name", *known) if key.endswith(".name")]
    known |= dict.fromkeys(key for key in types if key not in free and any(key in flat for flat in flats))
    own = ["method.name", *(key for key in known if key not in free)]
    groups = _numbered(tuple(repr(flat.get(key)) for key in own) for flat in flats)
    order = dict.fromkeys([*(key for flat in flats for key in flat), *known])
    for key in [key for key in order if key not in {"method.name", *known, *free}]:
        finer = _numbered((group, repr(flat.get(key))) for group, flat in zip(groups, flats, strict=True))
        if max(finer, default=0) > max(groups, default=0):
            known[key], groups = None, finer
    return [key for key in order if key in known]


def _numbered(values: Iterable[Any]) -> list[int]:
    """The number of each among the distinct ones."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def is_tables(value: Any) -> bool:
    """Whether a value is a list of tables (`tasks`): one value, where every other list of a sweep file is an axis."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def task_names(tables: list[dict[str, Any]]) -> list[str]:
    """What each task of a list is called: its data, and where that is shared, the fields in which they differ."""
    names = [str(table.get("data") or table.get("name")).rstrip("/").split("/")[-1].split(":")[-1] for table in tables]
    alike = {name: [table for table, own in zip(tables, names, strict=True) if own == name] for name in names}
    texts = []
    for name, table in zip(names, tables, strict=True):
        differing = [key for key in table if any(other.get(key) != table[key] for other in alike[name])]
        extra = ", ".join(f"{key} {table[key]}" for key in differing)
        texts.append(f"{name} ({extra})" if extra else name)
    return texts


def brief(value: Any) -> Any:
    """A value of a flattened spec as one line shows it: a list of tasks by their names."""
    return " > ".join(task_names(value)) if is_tables(value) else value


def short(value: Any) -> Any:
    """The same for a terminal: of a long text, the beginning."""
    found = brief(value)
    return clip(found) if isinstance(found, str) else found


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    table: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = table
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return table


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and not isinstance(value, bool):
        return int(value)
    return value


def method_seed(spec: RunSpec, **also: int) -> int:
    """Seed of a method's own initialization and dropout.

    It depends on the method too: from one random stream the A of rank 8 would be the first rows of the A of rank 64,
    and their subspaces would agree for no other reason.
    """
    content = canonical_json({"seed": spec.seed, "method": spec.to_json()["method"]} | also)
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")
