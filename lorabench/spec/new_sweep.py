"""A commented sweep file for one's own data: the task and its columns are guessed from the first rows, and said so."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

from lorabench.config import plugins
from lorabench.config.decode import InputError, decode
from lorabench.config.quote import clip, show, show_path
from lorabench.data.columns import without_header
from lorabench.data.dataset import read_data
from lorabench.data.rows_file import Row
from lorabench.data.values import find
from lorabench.models.base_model import builtin_models
from lorabench.spec.described import toml
from lorabench.spec.sweep import parse_sweep

NUM_ROWS = 200
"""That are looked at."""
MODELS = {
    "AutoModelForCausalLM": "builtin:tiny-llama",
    "AutoModelForSequenceClassification": "builtin:tiny-llama",
    "AutoModelForSeq2SeqLM": "builtin:tiny-t5",
    "AutoModelForImageClassification": "builtin:tiny-vit",
    "DiffusionPipeline": "builtin:tiny-diffusion",
}
"""The class of transformers or diffusers that a task loads -> the built-in model that does, until one names another."""
DATA = {
    "builtin:arithmetic": ("completion", "seq2seq"),
    "builtin:questions": ("chat", "classification", "multiple_choice", "regression"),
    "builtin:digits-turned": ("image_classification",),
    "builtin:digits-outlined": ("denoising",),
}
"""Built-in data -> the tasks that read it where no data are named; any other reads running text."""
ORDER = (
    "image_classification", "denoising", "chat", "multiple_choice", "classification", "regression", "completion",
    "text",
)  # fmt: skip
"""In which tasks are tried, the more particular first; others come behind."""

Table = dict[str, str]
"""`data`, and `columns` of what has no header line: fields of any task."""
HEADLESS = "columns = {} # the first line looks like a row, no header: call the columns what you like"

SEQ_LEN = "seq_len = {} # tokens; what is longer is cut\n"

TEXT = """\
# Question: how near does LoRA come to full fine-tuning on {head}, and what rank does it need?

# Written by `lorabench new`: read it, change it, then
#     lorabench plan {file}      # what will run, and what it will take; checks all of the data
#     lorabench run {file}
#     lorabench analyze          # tables, figures, report.html
# Columns found: {columns}

[base] # shared by all runs; a list is an axis
model = {model} # a Hub id, or a local folder{real}
task.name = "{task}" # `lorabench list {task}` shows all of its fields
task.data = {data} # without a validation split, 1 row in 20 is held out
{fields}
# task.max_train = 1000 # at most so many examples
{seq_len}batch_size = 8
steps = 100 # optimizer steps
seed = [0, 1, 2] # for intervals

[[grid]] # every combination of its lists
method.name = "lora" # `lorabench list lora` shows all of its fields
method.rank = [1, 4, 16]
method.targets = "all-linear"
lr = [1e-3, 4e-3]

[[grid]] # … and of this block's
method.name = "full"
lr = [2e-4, 1e-3]

[select] # each setting is compared at its own best learning rate
over = "lr"
by = "{value}"

[[table]]
rows = ["method.name"]
columns = "method.rank"
value = "{value}"

[[table]]
rows = ["method.name"]
columns = "method.rank"
value = "peak_gib"

[[figure]]
name = "rank_quality"
value = "{value}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guessed:
    """A task that can read the rows."""

    task: Any
    fields: dict[str, Any]
    """Those of its fields that were found in the rows."""


def new_sweep(task: str | None, data: str | None, model: str | None, file: str = "FILE.toml") -> str:
    """The text of a sweep file. InputError where no task, or not the one asked for, can read the data."""
    source = data or next((own for own, tasks in DATA.items() if task in tasks), "builtin:python-code")
    rows = read_data(source).splits["train"][:NUM_ROWS]
    names = ",".join(without_header(rows))
    if names:
        rows = read_data(source, columns=names).splits["train"][:NUM_ROWS]
    table = {"data": source} | ({"columns": names} if names else {})
    found = _asked_for(task, table, rows, model) if task else _first_that_fits(table, rows, model)
    text = _text(found, table, rows, model or MODELS[found.task.auto_class], file)
    parse_sweep(tomllib.loads(text), text)
    return text


def _first_that_fits(table: Table, rows: list[Row], model: str | None) -> Guessed:
    for name in dict.fromkeys([*ORDER, *plugins.names("tasks")]):
        cls: Any = plugins.plugin_class("tasks", name)
        if cls.auto_class in MODELS and (found := _fit(name, table, rows, model)):
            return found
    raise InputError(
        f"--data {show_path(table['data'])}: no task is known by its columns, {_named(rows)}: --task names one"
    )


def _fit(name: str, table: Table, rows: list[Row], model: str | None) -> Guessed | None:
    """None where the task cannot read the rows."""
    try:
        return _asked_for(name, table, rows, model)
    except InputError:
        return None


def _asked_for(name: str, table: Table, rows: list[Row], model: str | None) -> Guessed:
    cls: Any = plugins.plugin_class("tasks", name)
    if model is None and cls.auto_class not in MODELS:
        raise InputError(f"--model: is missing: {name} needs one that {cls.auto_class} loads, and none is built in")
    fields = cls.guess(rows, model or MODELS[cls.auto_class])
    if not fields:
        says = f"no columns of {show_path(table['data'])} are known as what {name} reads: {_named(rows)}"
        raise InputError(f"--task {name}: {says}; `lorabench list {name}` shows its fields")
    task: Any = decode(cls, table | fields, "task.")
    task.usable("train", rows, {})
    return Guessed(task=task, fields=fields)


def _named(rows: list[Row]) -> str:
    return clip(", ".join(dict.fromkeys(name for row in rows for name in row)), 300)


def _text(found: Guessed, table: Table, rows: list[Row], model: str, file: str) -> str:
    name, is_builtin, source = found.task.name, model in builtin_models(), table["data"]
    fields = [f"task.{HEADLESS}".format(toml(table["columns"]))] if "columns" in table else []
    fields += [f"task.{key} = {toml(value)}{_example(value, rows[0])}" for key, value in found.fields.items()]
    return TEXT.format(
        head=clip(source.rpartition("/")[2] or source),
        file=file,
        columns=_named(rows),
        model=toml(model),
        real=": a real one in place of this tiny one" if is_builtin else "",
        task=name,
        data=toml(source),
        fields="\n".join(fields),
        seq_len=SEQ_LEN.format(128 if is_builtin else 256) if found.task.unit == "tokens" else "",
        value="valid_accuracy" if "accuracy" in found.task.reports else "valid_loss",
    )


def _example(value: Any, row: Row) -> str:
    """A comment with what stands in the first row, of a column or of several."""
    values = [find(row, name.strip()) for name in str(value).split(",")]
    first = values[0] if len(values) == 1 else values
    return "" if None in values else f" # in the first row: {show(first, 60)}"
