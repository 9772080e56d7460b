"""What keys, values and measures are called in tables and figures."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from lorabench.spec.claim import NULL
from lorabench.spec.known import known_measures
from lorabench.spec.measures import Measure, find
from lorabench.spec.run_spec import RunSpec
from lorabench.terminal.text import one_line

KEYS = {
    "lambda": "λ",
    "method.name": "method",
    "label": "method",
    "lr": "learning rate",
    "method.alpha": "alpha",
    "seq_len": "sequence length",
}
MEASURE_NAMES = {
    "lr": "best learning rate",
    "num_trainable": "trainable parameters",
    "num_parameters": "parameters",
    "trainable_share": "trainable share",
    "peak_gib": "peak memory",
    "tensor_peak_gib": "peak of live tensors",
    "load_peak_gib": "peak memory, loading",
    "forward_backward_peak_gib": "peak memory, forward and backward",
    "optimizer_peak_gib": "peak memory, optimizer step",
    "rollout_peak_gib": "peak memory, writing answers",
    "tokens_per_second": "throughput",
    "images_per_second": "throughput",
    "padded_tokens_per_second": "throughput, padding counted",
    "label_tokens_per_second": "throughput, labels only",
    "retain_loss_before": "retention loss before",
    "retain_loss_after": "retention loss after",
    "base_valid_loss": "base validation loss",
    "drift_task": "drift of layers on the task",
    "drift_task_null": "drift on the task by chance",
    "drift_retain": "drift of layers on what is retained",
    "drift_retain_null": "drift on what is retained by chance",
    "kl_task": "KL(base ‖ tuned) on the task",
    "kl_retain": "KL(base ‖ tuned) on what is retained",
    "dynamics.settled_step": "settled step, input side",
    "dynamics.settled_step_output": "settled step, output side",
}
PREFIXES = {
    "base_valid_": "base validation ",
    "base_test_": "base test ",
    "valid_": "validation ",
    "test_": "test ",
    "train_": "training ",
}
WORDS = {
    "token f1": "word F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "macro f1": "macro-F1",
    "matthews": "Matthews correlation",
    "majority": "majority class",
    "flops": "FLOPs",
}
SPEAKING = ("label", "objective.name", "optimizer.name", "optimizer.type", "method.name", "method.type",
            "quantization", "model", "method.targets",
            "task.name")  # fmt: skip
"""Keys whose values need no name beside them."""
UNIT_SUFFIXES = ("_gib", "_seconds", "_bytes", "_joules")


def key_label(key: str) -> str:
    """`method.rank` -> `rank`, `task.name` -> `task`."""
    parent, _, last = key.rpartition(".")
    return KEYS.get(key) or (parent if last == "name" and parent else last).replace("_", " ")


def value_label(value: Any) -> str:
    """`0.003` -> `0.003`, `1e-05` -> `1e-5`, None -> an en dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        mantissa, e, exponent = f"{value:g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    return one_line(str(value))


def series_label(keys: Sequence[str], values: Sequence[Any], *, full: bool = False) -> str:
    """`lora, nf4`: keys that speak for themselves are not named, and `none` is silent unless in `full`."""
    words = []
    for key, value in zip(keys, values, strict=True):
        if key == "quantization" and value == "none":
            words += ["unquantized"] if full else []
        elif value is not None:
            words.append(value_label(value) if key in SPEAKING else f"{key_label(key)} {value_label(value)}")
    return ", ".join(words)


def column_label(key: str, value: Any) -> str:
    """A value as the head of a column: `64`, or `no rank` for the runs without such a key."""
    return f"no {key_label(key)}" if value is None else value_label(value)


_LOSSES: ContextVar[str] = ContextVar("losses", default="nats")
"""What losses are in, of what is shown."""


@contextmanager
def losses_of(runs: Iterable[RunSpec]) -> Iterator[None]:
    """Losses are labelled inside as these runs have them: no nats where all tasks take the mean square."""
    units = {task.loss_unit for run in runs for task in run.stages}
    token = _LOSSES.set(units.pop() if len(units) == 1 else "nats")
    try:
        yield
    finally:
        _LOSSES.reset(token)


def measure(name: str) -> Measure:
    found = known_measures().get(name) or find(name) or Measure("", None, name, "other")
    is_loss = found.unit == "nats" and not name.startswith("kl_")
    return replace(found, unit=_LOSSES.get()) if is_loss else found


def shown_factor(name: str) -> float:
    """What a measure is multiplied by where it is shown: 100 for percentages."""
    return 100.0 if measure(name).unit == "%" else 1.0


def measure_label(name: str) -> str:
    """`valid_loss` -> `validation loss`, `spectrum.rank_90` -> `rank 90`; the unit apart."""
    if name in MEASURE_NAMES:
        return MEASURE_NAMES[name]
    if name.endswith(NULL):
        return f"{measure_label(name.removesuffix(NULL))} by chance"
    text = name.rpartition(".")[2]
    for suffix in UNIT_SUFFIXES:
        text = text.removesuffix(suffix)
    for prefix, word in PREFIXES.items():
        if text.startswith(prefix):
            text = word + text.removeprefix(prefix)
    text = text.replace("_", " ")
    for word, better in WORDS.items():
        text = text.replace(word, better)
    return text


def with_unit(name: str) -> str:
    """`validation loss (nats)`."""
    unit = measure(name).unit
    return f"{measure_label(name)} ({unit})" if unit else measure_label(name)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def distinct(name: str, taken: Container[str], pattern: str = "_{}") -> str:
    """A name that is not taken: `name`, `name_2`, …"""
    names = itertools.chain([name], (name + pattern.format(number) for number in itertools.count(2)))
    return next(candidate for candidate in names if candidate not in taken)


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
