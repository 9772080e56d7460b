"""What a task is: data turned into examples, a loss, and the field's metrics.

Shapes: n examples in a batch, t tokens, v vocabulary or classes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge

from lorabench.config.decode import InputError, decode_plugin, later
from lorabench.config.plugins import Plugin, plugin_class
from lorabench.config.quote import clip, show
from lorabench.data.rows_file import Row
from lorabench.spec.measures import MEASURES, OWN

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lorabench.spec.generate import Generate
    from lorabench.spec.run_spec import RunSpec

Example = dict[str, Any]
"""`input_ids` (t,) and `labels`: (t,) with IGNORE where nothing is predicted, or one class (int) or score (float).
Of an encoder-decoder `labels` are (s,), what it is to write.

`token_type_ids` (t,) where the tokenizer tells the texts of a pair apart by them. Whole numbers by other names are the
task's own: they are (n,) in a batch, and no input of the model. Of an image there are `pixel_values` instead of tokens,
`lorabench.data.images.Pixels` (channels, height, width); of a denoiser's, its `timestep`, and what else it is told.
"""
IGNORE = -100


class Sets(dict[str, Any]):
    """Data sets by the names under which what is measured on them is shown: a source, or a table with the fields of a
    task. Not to be changed: a task is a key of caches."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


SET_NAME = re.compile(r"[a-z]([a-z0-9_]{0,38}[a-z0-9])?")
MEAN = "mean"
"""What the mean over several sets is called; none may have its name."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is given to answer, and what it should answer."""

    ids: NDArray[Any]
    """Tokens (t,)."""
    text: str
    reference: str
    tail: str = ""
    """What `ids` lack of the text, for its token is the answer's first: an answer begins with it."""


@dataclass(frozen=True, kw_only=True)
class Task(Plugin, ABC):
    """Fields say where the data is and how to read it. Add a task by adding one file to `lorabench/tasks/`."""

    folder: ClassVar[str] = "tasks"
    in_sweep: ClassVar[tuple[str, str]] = ("[base]", "task")
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The transformers class that loads the base model."""
    reports: ClassVar[tuple[str, ...]] = ("loss",)
    """The names that `metrics` gives, for the sweep file's check; see `reported`."""
    sequences: ClassVar[tuple[str, ...]] = ("input_ids",)
    """What of an example goes through the model: what it reads, and of an encoder-decoder the `labels` that its decoder
    is to write, which are of a length of their own."""
    unit: ClassVar[Literal["tokens", "images"]] = "tokens"
    """What is counted of examples: of throughput, and where only some are looked at."""
    loss_unit: ClassVar[Literal["nats", ""]] = "nats"
    """Of its loss; a mean square has none."""
    is_running_text: ClassVar[bool] = False
    """Whether a single row may be cut up, its end held out for validation."""

    data: str = "builtin:python-code"
    """`builtin:NAME`, a local file or folder, or a Hub data set (`name` or `name:config`)."""
    data_revision: str | None = None
    max_train: Annotated[int, Ge(1)] | None = None
    """At most this many training examples (None: all)."""
    max_eval: Annotated[int, Ge(1)] | None = None
    """At most this many validation, test and retention examples each (None: all)."""
    tests: dict[str, Any] = later(Sets())  # noqa: RUF009
    """Further test sets, each evaluated once, after training: name -> source, read as this task's own data is, or a
    table with the fields of another task."""

    def __post_init__(self) -> None:
        for key in ("tests", "retain"):
            if isinstance(getattr(self, key, None), dict):
                object.__setattr__(self, key, Sets(getattr(self, key)))
        try:
            self.others  # noqa: B018  made now, so that what is wrong of them shows
        except InputError as error:
            raise ValueError("\n".join(error.problems)) from None

    @property
    def others(self) -> dict[str, Task]:
        """What is evaluated beside the task's own splits: `test_NAME`, `retain` or `retain_NAME` -> what reads it.

        InputError with what is wrong of them. Not to be changed.
        """
        return _others(self)

    def _other(self, key: str, name: str, value: Any) -> Task:
        where = f"{key}.{clip(name)}" if name else key
        if name and (not SET_NAME.fullmatch(name) or name == MEAN or any(f"test_{name}_{m}" in MEASURES for m in OWN)):
            rule = "small letters, digits and _, and no word that a measure's own name has there"
            raise InputError(f"{where} = {show(value)}: its name must be of {rule}")
        if isinstance(value, str) and key == "tests":
            own: Any = {"retain": None} if hasattr(self, "retain") else {}
            return _writing_everywhere(dataclasses.replace(self, data=value, data_revision=None, tests=Sets(), **own))
        if isinstance(value, str):
            return self.retaining(value)
        if not isinstance(value, dict):
            raise InputError(f"{where} = {show(value)}: must be a data set, or a table with the fields of a task")
        if "data" not in value:
            raise InputError(f"{where}.data: is missing")
        other = decode_plugin(Task, {"max_eval": self.max_eval} | value, where)
        if other.auto_class != self.auto_class:
            raise InputError(f'{where}.name = "{other.name}": needs another kind of model than {self.name} does')
        if other.others:
            raise InputError(f"{where}: has tests or a retention set of its own")
        return _writing_everywhere(other)

    def retaining(self, data: str) -> Task:
        """What reads a retention set of which only the data are named: as running text."""
        text: Task = plugin_class(self.folder, "text")(data=data, max_eval=self.max_eval)
        return text

    @property
    def generation(self) -> Generate | None:
        """What a model is to write after training; None of a task that has it write nothing."""
        return None

    @property
    def reported(self) -> tuple[str, ...]:
        """The names of all that is measured on a split."""
        return self.reports + (self.generation.reports if self.generation else ())

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        """The fields by which it could read these rows, for what `lorabench new` writes; none where it cannot."""
        return {}

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this task cannot be run as `spec` asks: `key = value: reason`."""
        return iter(())

    def sources(self) -> dict[str, str]:
        """The data sets that this task reads: role (`task`, and the keys of `others`) -> source."""
        return {"task": self.data} | {role: other.data for role, other in self.others.items()}

    def stratified_by(self) -> str | None:
        """The column whose values rows held out for validation have in the same shares as the rest."""
        return None

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        """The rows of `train`, `validation` or `test` that count; none of a test split that cannot be scored.

        InputError with what is wrong of them as far as it shows without a tokenizer: it is found before anything
        starts. `options` is what `model_options` has given of the training rows, empty where these are asked for.
        """
        return rows

    @abstractmethod
    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterable[Example]:
        """Tokenized examples of the usable rows of one split, of at most `seq_len` tokens each.

        Only the first `max_train` or `max_eval` are taken: an iterator need not make the others.
        """

    @property
    def beside(self) -> dict[str, Task]:
        """What is trained on beside the task's own examples: role -> what reads it."""
        return {}

    def step_rows(self, splits: dict[str, list[Example]], index: int, seed: Sequence[int]) -> list[Example]:
        """What a step of training is given of the training example `index`, by these numbers alone."""
        return [self.varied(splits["train"][index], seed)]

    def checks_with(self, model: str, revision: str | None) -> Any:
        """The same for a look at the data before anything starts: may make examples of the right shapes alone."""
        return self.reads_with(model, revision)

    def reads_with(self, model: str, revision: str | None) -> Any:
        """What `examples` is given to read rows with: the model's tokenizer."""
        from lorabench.models.base_model import load_tokenizer

        return load_tokenizer(model, revision)

    def lengths(self, example: Example) -> tuple[int, ...]:
        """Tokens of an example, of each of the `sequences`; of an image its shape."""
        return tuple(len(example[key]) for key in self.sequences)

    def size(self, row: Row) -> int:
        """About what it takes to make an example of a row, in characters of text."""
        return sum(len(value) for value in row.values() if isinstance(value, str))

    def varied(self, example: Example, seed: Sequence[int]) -> Example:
        """The example as a step of training sees it, by these numbers alone: with the task's augmentation."""
        return example

    def longest(self, seq_len: int) -> tuple[int, ...]:
        """Tokens of an example at most, of each of the `sequences`."""
        return (seq_len,)

    def scored(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterable[list[Example]]:
        """What validation and test score, and `max_eval` counts: here single examples, of some tasks several together.

        `metrics` is given their scores in this order.
        """
        return ([example] for example in self.examples(rows, tokenizer, seq_len, options))

    def prompts(self, rows: list[Row], tokenizer: Any, seq_len: int) -> list[Prompt]:
        """What a model is given to write to, of the usable rows of one split; where there is a `generation`."""
        return []

    def check_answers(self, rows: list[Row]) -> None:
        """InputError where what is written to a usable row could not be told right from wrong."""
        return

    def model_options(self, rows: list[Row]) -> dict[str, Any]:
        """Further arguments for loading the base model (`num_labels`), from the usable training rows."""
        return {}

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> int:
        """Number of predictions in a batch: what the summed loss is divided by."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Summed over the batch's predictions: cross-entropy in nats, or squares where that is the `loss_unit`."""

    @abstractmethod
    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> Any:
        """What `metrics` needs of one batch, small enough to keep for all batches."""

    @abstractmethod
    def metrics(self, loss: float, scores: list[Any]) -> dict[str, float | None]:
        """The field's metrics of a whole split; `loss` is the mean over its predictions."""


def _writing_everywhere(task: Any) -> Task:
    """Whatever split its rows are taken from."""
    if task.generation is None:
        return task
    generate = dataclasses.replace(task.generation, splits="both")
    return dataclasses.replace(task, generate=generate)


@lru_cache(maxsize=256)
def _others(task: Task) -> dict[str, Task]:
    found, problems = {}, []
    retain = getattr(task, "retain", None)
    retained = {"": retain} if isinstance(retain, str) else retain or {}
    for key, sets in (("tests", task.tests), ("retain", retained)):
        for name, value in sets.items():
            try:
                found["_".join([key.removesuffix("s"), *([name] if name else [])])] = task._other(key, name, value)
            except InputError as error:
                problems += error.problems
    names = [f"{split}_{metric}" for split, other in found.items() for metric in other.reported]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        problems.append(f"tests, retain: two of these sets would both have the measure {clip(twice)}: rename one")
    if problems:
        raise InputError(problems)
    return found


class Told(NamedTuple):
    """What a model tells of the tokens that it is to predict; each of one shape."""

    targets: Tensor
    """IGNORE where there is none."""
    nats: Tensor
    """Of each target, in float32; 0 where there is none."""
    is_right: Tensor
    """Whether the target is the likeliest of all tokens."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Told:
        """Of logits (..., v) and targets (...)."""
        from torch.nn.functional import cross_entropy

        rows, flat = logits.flatten(0, -2), targets.flatten()
        nats = cross_entropy(rows.float(), flat, ignore_index=IGNORE, reduction="none").view_as(targets)
        return cls(targets, nats, (logits.argmax(-1) == targets) & (targets != IGNORE))


class LanguageModeling(Task):
    """Next-token prediction: what `text`, `completion` and `seq2seq` share.

    Neither loss nor scores need the logits of a whole batch at a time: the one is a sum over `targets`, the others are
    made by `score_tokens` of what is told of each token that is `asked` for.
    """

    reports: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def asked(self, batch: dict[str, Tensor]) -> Tensor:
        """(n, t): the tokens that are scored, the `targets` among them."""
        return self.targets(batch)

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """(n, t): the token that each position's logits are to predict, IGNORE where there is none."""
        from torch.nn.functional import pad

        # The labels are shifted, not the logits: a slice of those is copied, and its gradient padded by a copy more.
        return pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((self.targets(batch) != IGNORE).sum())

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy

        targets = self.targets(batch).flatten()
        return cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")

    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> Any:
        return self.score_tokens(Told.of(logits, self.asked(batch)), batch)

    def score_tokens(self, told: Told, batch: dict[str, Tensor]) -> Any:
        """What `metrics` needs of one batch."""
        return int(told.is_right.sum()), int((told.targets != IGNORE).sum())

    def metrics(self, loss: float, scores: list[tuple[int, int]]) -> dict[str, float | None]:
        right, total = (sum(column) for column in zip(*scores, strict=True))
        perplexity = math.exp(loss) if loss < 700 else None  # exp overflows a float64 past 709
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / total}
