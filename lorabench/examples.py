"""Examples -> batches: collation, and a data order that depends on the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lorabench.data import Data, read_data
from lorabench.decode import InputError
from lorabench.task import IGNORE, Example

if TYPE_CHECKING:
    from lorabench.spec import RunSpec

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenized splits of one run (`train`, `validation`, `test`, `retain`) and where they come from."""

    splits: dict[str, list[Example]]
    model_options: dict[str, Any]
    padding: int
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def prepare(spec: RunSpec, tokenizer: Any) -> Examples:
    """Read, tokenize and cut down the data of a run."""
    task = spec.task
    columns = getattr(task, "columns", None)
    data = {role: read_data(source, _revision(spec, role), columns) for role, source in task.sources().items()}
    main = data["task"].splits
    options = task.model_options(main["train"])
    make = lambda rows: task.examples(rows, tokenizer, spec.seq_len, options)  # noqa: E731
    splits = {"train": make(main["train"])[: task.max_train]}
    splits |= {split: make(main[split])[: task.max_eval] for split in ("validation", "test")}
    if "retain" in data:
        splits["retain"] = _retained(spec, data["retain"], tokenizer)
    if not splits["train"] or not splits["validation"]:
        raise InputError(f'task.data = "{task.data}": gives no training or no validation examples')
    return Examples(
        splits=splits,
        model_options=options,
        padding=tokenizer.pad_token_id,
        fingerprints={role: item.fingerprint for role, item in data.items()},
        notes={role: item.note for role, item in data.items() if item.note},
    )


def _revision(spec: RunSpec, role: str) -> str | None:
    return spec.task.data_revision if role == "task" else None


def _retained(spec: RunSpec, data: Data, tokenizer: Any) -> list[Example]:
    """The retention set is running text whatever the task is: its validation split, as `text` reads it."""
    from lorabench.tasks.text import Text

    return Text().examples(data.splits["validation"], tokenizer, spec.seq_len, {})[: spec.task.max_eval]


def collate(examples: list[Example], padding: int, device: torch.device) -> Batch:
    """Tensors (n, longest) on `device`, padded on the right; no attention mask where nothing is padded."""
    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), longest), padding)
    per_token = isinstance(examples[0]["labels"], list)
    labels = torch.full((len(examples), longest), IGNORE) if per_token else torch.tensor(
        [example["labels"] for example in examples]
    )  # fmt: skip
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    for row, example in enumerate(examples):
        ids[row, : lengths[row]] = torch.tensor(example["input_ids"])
        if per_token:
            labels[row, : lengths[row]] = torch.tensor(example["labels"])
    batch = {"input_ids": ids, "labels": labels}
    if (lengths < longest).any():
        batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


class Order:
    """Which examples a step sees: epoch after epoch, each shuffled by a generator of (seed, epoch) alone."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def indices(self, step: int) -> list[int]:
        """The examples of step 0, 1, …; a batch may reach into the next epoch."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._at(*divmod(position, self.size)) for position in positions]

    def _at(self, epoch: int, offset: int) -> int:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self._permutation[offset])
