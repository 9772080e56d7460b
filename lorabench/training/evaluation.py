"""What a model is worth on a split: of a run, of its untouched base, of any other model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench.config.decode import encode
from lorabench.processes.distributed import ALONE, World
from lorabench.spec.generate import ENDS
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import IGNORE, LanguageModeling, Task, Told
from lorabench.store.base_results import BaseResult, read_result, result_file, write_result
from lorabench.store.generations import Generation
from lorabench.training import ranks
from lorabench.training.environment import source_digest
from lorabench.training.examples import Batch, Examples, collate, end_to_end, reader
from lorabench.training.generation import answers
from lorabench.training.passes import autocast, forward
from lorabench.training.predictions import by_tokens, told
from lorabench.training.scoring import scores
from lorabench.training.state import Score, Training
from lorabench.training.stop import Diverged, Stop

PREFIX = {"validation": "valid"}
"""Of the measures of a split, where it is not the split's own name."""
FIRST = 2
"""Examples on which a base shows that it is the same."""
Tell = Callable[..., None]
"""Is told what is being done, and how far it is: `Attempt.phase`."""


def evaluate_base(training: Training, stop: Stop, tell: Tell, runs: Path) -> bool:
    """What the untouched base does on the tasks; a random prompt in front of it would be another model.

    True where it is what an earlier run of the store, whose folder of runs is given, has measured: of a base that
    computes the very same bits on the first examples, whatever the run's method.
    """
    tell("evaluate base")
    with training.meter.clock("evaluate"):
        model = training.model if training.spec.method.starts_at_base else training.base.untouched()
        is_measured = bool(training.base.measured)
        file = result_file(runs, _content(training, model)) if training.world.size == 1 and not is_measured else None
        known = training.base.measured[0] if is_measured else read_result(file) if file else None
        result = known or _of_base(training, _Evaluation(training, stop, tell, model))
        training.base.measured[:] = [result]
        if file and not known:
            with contextlib.suppress(OSError):  # what is kept for others is no reason for this run to fail
                write_result(file, result)
    training.rows.append(result.row)
    training.metrics |= result.metrics
    ranks.seed(training)
    return known is not None


def _of_base(training: Training, on: _Evaluation) -> BaseResult:
    row = [on.losses(examples, "validation") for examples in training.base.stages]
    metrics = {f"base_{name}": value for name, value in row[-1].items() if f"base_{name}" in MEASURES}
    last = training.base.stages[-1]
    for split in last.task.generation.measured_splits if last.task.generation else ():
        metrics |= {f"base_{name}": value for name, value in on.answers(last, split).items()}
    for split, examples in _others(training.base.stages, "retain"):
        metrics |= {f"{name}_before": value for name, value in _retained(split, on.all(examples, split)).items()}
    return BaseResult(row=row, metrics=metrics)


@torch.no_grad()
def _content(training: Training, model: nn.Module) -> dict[str, Any]:
    """All that an evaluation of the base depends on; the model by what it computes of the first examples."""
    spec, examples = training.spec, training.base.stages[-1]
    batch = collate(examples.splits["validation"][:FIRST], examples.padding, next(model.parameters()).device)
    model.eval()
    with autocast(spec, training.meter.device):
        logits = forward(model, batch).float().cpu().contiguous()
    own = {key: getattr(spec, key) for key in ("seq_len", "dtype", "quantization", "threads", "padding")}
    return own | training.base.content | {
        "tasks": [encode(task) for task in spec.stages],
        "size": spec.micro_batch_size or spec.batch_size,
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "code": source_digest(),
    }  # fmt: skip


def evaluate_task(training: Training, stop: Stop, tell: Tell) -> None:
    """What the model does on every task after training on one; after the last, on the other splits too."""
    tell("evaluate")
    with training.meter.clock("evaluate"):
        on = _Evaluation(training, stop, tell, training.model)
        row = [on.losses(examples, "validation") for examples in training.base.stages]
        is_last = training.stage == len(training.base.stages) - 1
        found = row[-1] | _at_the_end(training, on) if is_last else {}
    training.rows.append(row)
    if is_last:
        training.metrics |= found
        training.generations = on.written
        num_last = max(1, training.spec.steps // 10)
        last = training.losses[-num_last:]
        training.metrics["train_loss"] = sum(last) / len(last)
        steps = [row for row in map(json.loads, training.log) if "loss" in row]
        training.metrics |= training.spec.objective.metrics(steps[-num_last:])


def splits_after(training: Training) -> tuple[tuple[Examples, str], ...]:
    """Those whose loss is measured after training on a task."""
    stages = training.base.stages
    if training.stage < len(stages) - 1:
        return tuple((examples, "validation") for examples in stages)
    tested = [(examples, "test") for examples in stages if examples.splits.get("test")][-1:]
    others = [(examples, split) for kind in ("test_", "retain") for split, examples in _others(stages, kind)]
    return (*((examples, "validation") for examples in stages), *tested, *others)


def _at_the_end(training: Training, on: _Evaluation) -> dict[str, float]:
    """What is measured once, by its names: answers, the test splits and sets, and what is retained."""
    last = training.base.stages[-1]
    found: dict[str, float] = {}
    having = [examples for examples in training.base.stages if examples.splits.get("test")]
    for examples in having[-1:]:
        found |= on.losses(examples, "test")
    for split in last.task.generation.measured_splits if last.task.generation else ():
        found |= on.answers(last, split)
    tested = {split: on.all(examples, split) for split, examples in _others(training.base.stages, "test_")}
    found |= {name: value for each in tested.values() for name, value in each.items()} | _means(tested)
    changes = []
    for split, examples in _others(training.base.stages, "retain"):
        for name, value in _retained(split, on.all(examples, split)).items():
            found[f"{name}_after"] = value
        changes.append(found[f"{split}_loss_after"] - training.metrics[f"{split}_loss_before"])
        if split != "retain":
            found[split.replace("retain", "forgetting", 1)] = changes[-1]
    return found | ({"forgetting": sum(changes) / len(changes)} if changes else {})


def retained_sets(stages: list[Examples]) -> list[tuple[Examples, str]]:
    """The retention sets, each with the task that has it."""
    return [(examples, split) for split, examples in _others(stages, "retain")]


def _others(stages: list[Examples], kind: str) -> list[tuple[str, Examples]]:
    """The sets of that kind beside the tasks' own splits, each with the last task that has it."""
    found = {
        split: examples
        for examples in stages
        for split in examples.task.others
        if split.startswith(kind) and examples.splits.get(split)
    }
    return list(found.items())


def retention_of(model: nn.Module, spec: RunSpec, stages: list[Examples]) -> dict[str, float]:
    """The metrics of a run's retention set, `retain_loss` and its like; of several sets the mean of their losses."""
    found = {split: metrics_of(model, spec, examples, split) for split, examples in _others(stages, "retain")}
    if "retain" in found or not found:
        return found.get("retain", {})
    return {"retain_loss": sum(each[f"{split}_loss"] for split, each in found.items()) / len(found)}


def _retained(split: str, found: dict[str, float]) -> dict[str, float]:
    """All that is kept of a named set; of a single one its loss."""
    return {"retain_loss": found["retain_loss"]} if split == "retain" else found


def _means(tested: dict[str, dict[str, float]]) -> dict[str, float]:
    """`test_mean_accuracy` and its like, of what is measured on each of the sets."""
    bare = [{name.removeprefix(f"{split}_"): value for name, value in each.items()} for split, each in tested.items()]
    names = [name for name in (bare[0] if bare else ()) if all(name in each for each in bare)]
    names = [name for name in names if not name.endswith(ENDS[1:]) and not name.startswith("num_")]
    return {f"test_mean_{name}": sum(each[name] for each in bare) / len(bare) for name in names}


class _Evaluation:
    """Of one model, the run's own or another; keeps what it has written."""

    def __init__(self, training: Training, stop: Stop, tell: Tell, model: nn.Module):
        self.training, self.stop, self.tell, self.model = training, stop, tell, model
        self.written: list[Generation] = []

    def all(self, examples: Examples, split: str) -> dict[str, float]:
        return self.losses(examples, split) | self.answers(examples, split)

    def losses(self, examples: Examples, split: str) -> dict[str, float]:
        return evaluate(self.training, examples, split, self.stop, self.model)

    def answers(self, examples: Examples, split: str) -> dict[str, float]:
        """How good are the answers to a split's prompts, where it has any."""
        prompts, generate = examples.prompts.get(split, []), reader(examples.task, split).generation
        if generate is None or not prompts:
            return {}
        with self.training.meter.clock("generate"):
            texts = answers(
                self.model, self.training.spec, generate, prompts, world=self.training.world, check=self.stop.check,
                tell=lambda done, of: self.tell("generate", done=done, of=of),
            )  # fmt: skip
            found, own = scores(texts, generate)
        self.tell("evaluate")
        self.written += [
            Generation(split=split, number=number, scores=score, **vars(text))
            for number, (text, score) in enumerate(zip(texts, own, strict=True), 1)
        ]
        return {f"{PREFIX.get(split, split)}_{name}": value for name, value in found.items()}


def evaluate(
    training: Training, examples: Examples, split: str, stop: Stop, model: nn.Module | None = None
) -> dict[str, float]:
    """Loss and metrics of a split, by their names in MEASURES; nothing where the split is empty.

    Of `model` where one is given.
    """
    is_own = model is None or model is training.model
    scores = training.scored.get((examples.task, split)) if is_own else None
    if scores is None:
        found = metrics_of(model or training.model, training.spec, examples, split, stop, training.world)
    else:
        found = _metrics(examples, split, scores)
    for name, value in found.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise Diverged(f"step {training.step}: {split} loss {value}")
    return found


def metrics_of(
    model: nn.Module, spec: RunSpec, examples: Examples, split: str, stop: Stop | None = None, world: World = ALONE
) -> dict[str, float]:
    """`evaluate` of any model, as `spec` has it; the loss may be infinite."""
    return _metrics(examples, split, scores_of(model, spec, examples, split, stop, world))


@torch.no_grad()
def scores_of(
    model: nn.Module, spec: RunSpec, examples: Examples, split: str, stop: Stop | None = None, world: World = ALONE
) -> list[Score]:
    """Of each batch of a split, in order. Ranks take the batches in turn, and each has those of all."""
    device = next(model.parameters()).device
    task = reader(examples.task, split)
    rows, size = examples.splits.get(split, []), spec.micro_batch_size or -(-spec.batch_size // world.size)
    if not rows:
        return []
    model.eval()
    found: list[Score] = []
    for first in range(0, len(rows), size * world.size):
        if stop is not None:
            stop.check()
        start = first + size * world.rank
        if start >= len(rows) and not world.is_sharded:
            continue
        batch = collate(rows[start : start + size] or rows[:1], examples.padding, device)
        with autocast(spec, device, world):
            each = _score(model, task, batch, spec.padding)
        if start < len(rows):
            found.append(each)
    if world.is_sharded:
        model.reshard()  # else its outermost weights stay whole until the next step
    turns = zip_longest(*world.gather(found))
    return [each for turn in turns for each in turn if each is not None]


def _metrics(examples: Examples, split: str, found: list[Score]) -> dict[str, float]:
    if not found:
        return {}
    total, count, scores = 0.0, 0, []
    for each in found:
        total, count = total + each[0], count + each[1]
        scores.append(each[2])
    prefix = PREFIX.get(split, split)
    metrics = reader(examples.task, split).metrics(total / count, scores)
    return {f"{prefix}_{key}": value for key, value in metrics.items() if value is not None}


def _score(model: nn.Module, task: Task, batch: Batch, padding: str) -> Score:
    if not by_tokens(task):
        logits = forward(model, batch)
        return float(task.loss(logits, batch)), task.count(batch), task.score(logits, batch)
    found = _told_apart(model, batch, task.asked(batch)) if padding == "free" else told(model, batch, task.asked(batch))
    return score_of(task, found, batch)


def score_of(task: LanguageModeling, found: Told, batch: Batch) -> Score:
    """Of one batch: its summed loss, what that is a sum of, and what the task's metrics are made of."""
    is_target = task.targets(batch) != IGNORE
    return float(found.nats[is_target].sum()), task.count(batch), task.score_tokens(found, batch)


def _told_apart(model: nn.Module, batch: Batch, targets: torch.Tensor) -> Told:
    """`told` of a padded batch (n, t), by a pass over its examples laid end to end."""
    is_token = batch.get("attention_mask", torch.ones_like(targets)).bool()
    found = told(model, end_to_end(batch), targets[is_token][None])
    nats = torch.zeros(targets.shape, device=targets.device)
    is_right = torch.zeros_like(nats, dtype=torch.bool)
    nats[is_token], is_right[is_token] = found.nats[0], found.is_right[0]
    return Told(targets, nats, is_right)
