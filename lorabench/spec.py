"""One run, explained by one file: everything that can change its numbers, and nothing that cannot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from lorabench.decode import Pattern, decode, encode
from lorabench.method import Method
from lorabench.task import Task

Keep = Annotated[str, Pattern(r"updates|none|svd:[1-9][0-9]*", '"updates", "none" or "svd:K" (K at least 1)')]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run. Its id is the content hash of these fields: the same cell is never computed twice."""

    method: Method
    task: Task
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
    steps: Annotated[int, Ge(1)] = 200
    """Optimizer steps."""
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
    threads: Annotated[int, Ge(1), Le(1024)] = 1
    """CPU threads of a run. The order of a floating-point sum depends on it, so it is part of the spec."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Of data order, initialization and dropout."""

    def __post_init__(self) -> None:
        problems = [*self.method.problems(self), *self.task.problems(self)]
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            problems.append(f"micro_batch_size = {self.micro_batch_size}: must divide batch_size = {self.batch_size}")
        if problems:
            raise ValueError("\n".join(problems))

    @cached_property
    def id(self) -> str:
        """`<method>-<first 12 hex digits of the SHA-256 of the canonical JSON>`."""
        return spec_id(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return encode(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> RunSpec:
        """Raises InputError with every problem of the table."""
        return decode(cls, table)


def spec_id(table: dict[str, Any]) -> str:
    """The id of the spec in a JSON table, without decoding it: quick, and right for specs of older versions too."""
    return f"{table['method']['name']}-{hashlib.sha256(canonical_json(table)).hexdigest()[:12]}"


def canonical_json(table: dict[str, Any]) -> bytes:
    """One byte string per content: sorted keys, no spaces, and 1.0 written as 1 wherever it is equal to it."""
    return json.dumps(_canonical(table), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"method": {"rank": 4}}` -> `{"method.rank": 4}`: the keys of sweep files and the columns of tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def swept_keys(flats: list[dict[str, Any]]) -> list[str]:
    """The keys of which the runs that have them have different values, the method's name apart: what labels show."""
    values: dict[str, set[str]] = {}
    for flat in flats:
        for key, value in flat.items():
            values.setdefault(key, set()).add(repr(value))
    return [key for key, found in values.items() if len(found) > 1 and key != "method.name"]


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
