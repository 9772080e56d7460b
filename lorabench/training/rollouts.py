"""Answers that a model writes to training prompts, to be trained on: sampled, rewarded, and weighed in their group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lorabench.models.base_model import load_tokenizer
from lorabench.spec.run_spec import method_seed
from lorabench.spec.task import IGNORE, Example
from lorabench.training.batches import Batches, Work
from lorabench.training.examples import Batch, Order
from lorabench.training.generation import answer, written
from lorabench.training.passes import autocast
from lorabench.training.predictions import log_probs
from lorabench.training.scoring import exact_match

if TYPE_CHECKING:
    from lorabench.training.objectives.grpo import Grpo
    from lorabench.training.state import Training


class Rollouts(Batches):
    """Each step's answers, `training.rollout`, are drawn by a seed of their own; all ranks have all of them, and train
    on their share of those that tell something: without `kl`, an answer as good as all of its group adds nothing."""

    def __init__(self, training: Training, objective: Grpo, check: Callable[[], None]):
        super().__init__(training)
        spec = training.spec
        assert spec.task.generation is not None
        self.objective, self.check, self.generate = objective, check, spec.task.generation
        self.prompts = training.examples.prompts["train"]
        self.tokenizer = load_tokenizer(spec.model, spec.revision)
        self._order = Order(len(self.prompts), spec.batch_size // objective.group, spec.seed, training.stage)
        self._sums: dict[str, Tensor] = {}
        self._base = self._untouched() if objective.kl else None

    def next(self) -> tuple[list[Batch], Work]:
        training = self.training
        number, again = divmod(training.task_step, self.objective.inner_steps)
        if not again:
            with training.meter.clock("rollout"), training.meter.phase("rollout"):
                training.rollout = self._draw(number)
            training.model.train()
        self._sums = {}
        tell = [sample for sample in training.rollout if sample["advantage"] or self._base is not None]
        return self.parts(training.world.share(tell) or training.rollout[:1])

    def loss(self, model: nn.Module, part: Batch) -> Tensor:
        now = log_probs(model, part, shifted(part["labels"]), self.objective.temperature)
        drawn = part.get("drawn", now.detach())  # without, the model is still the one that wrote them
        mask = shifted(part["labels"]) != IGNORE
        advantages, weights = part["advantage"], part["weight"]
        loss, about = self.objective.policy_loss(now, drawn, advantages, weights, mask, part.get("base"))
        self._sums = {key: self._sums.get(key, 0) + value for key, value in about.items()}
        return loss

    def about(self) -> dict[str, float]:
        rollout, group = self.training.rollout, self.objective.group
        rewards = torch.tensor([sample["reward"] for sample in rollout]).view(-1, group)
        lengths = [sum(label != IGNORE for label in sample["labels"]) for sample in rollout]
        sums = self.training.world.sum([float(value) for value in self._sums.values()])
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "zero_advantage_share": float((rewards == rewards[:, :1]).all(1).float().mean()),
            "answer_tokens": sum(lengths) / len(lengths),
        } | dict(zip(self._sums, sums, strict=True))

    def collated(self, rows: Sequence[Example]) -> Batch:
        part = super().collated(rows)
        part |= {key: torch.tensor([row[key] for row in rows]) for key in ("advantage", "weight")}
        return part | {
            key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True)
            for key in ("drawn", "base")
            if key in rows[0]
        }

    def _untouched(self) -> nn.Module:
        with torch.random.fork_rng(), self.training.meter.loading():
            return self.training.base.untouched().requires_grad_(False).eval()

    def _draw(self, number: int) -> list[Example]:
        """The answers to the batch of prompts of that number, those to one prompt side by side."""
        training, objective = self.training, self.objective
        how = dataclasses.replace(
            self.generate,
            temperature=objective.temperature,
            top_p=1.0,
            seed=method_seed(training.spec, rollout=number),
            batch_size=max(self.generate.batch_size, training.micro),  # what a pass with gradients has room for
        )
        asked = [self.prompts[i] for i in self._order.indices(number) for _ in range(objective.group)]
        rows = written(training.model, training.spec, how, asked, world=training.world, check=self.check)
        texts = [answer(self.tokenizer, prompt, row) for prompt, row in zip(asked, rows, strict=True)]
        rewards = [exact_match(text.output, text.reference, self.generate) for text in texts]
        answers = [ended(row, self.tokenizer.eos_token_id) for row in rows]
        advantages = objective.advantages(torch.tensor(rewards).view(-1, objective.group)).flatten().tolist()
        weights = objective.weights([*map(len, answers)], self.generate.max_new_tokens)
        samples: list[Example] = []
        for prompt, row, reward, advantage, weight in zip(asked, answers, rewards, advantages, weights, strict=True):
            ids, labels = [*prompt.ids.tolist(), *row], [IGNORE] * len(prompt.ids) + row
            own = {"reward": reward, "advantage": advantage, "weight": weight}
            samples.append({"input_ids": ids, "labels": labels} | own)
        if objective.inner_steps > 1:
            self._score(training.model, samples, "drawn")
        if self._base is not None:
            self._score(self._base, samples, "base")
        return samples

    @torch.no_grad()
    def _score(self, model: Any, samples: list[Example], key: str) -> None:
        """Put the log-probabilities that a model gives each sample's tokens, (t,), under `key`."""
        training, found = self.training, []
        parts, _ = self.parts(training.world.share(samples))
        idle = [self.collated(samples[:1])] * training.idle_passes(len(parts))
        for place, part in enumerate([*parts, *idle]):
            part = {name: tensor.to(training.meter.device) for name, tensor in part.items()}
            with autocast(training.spec, training.meter.device, training.world):
                values = log_probs(model, part, shifted(part["labels"]), self.objective.temperature)
            found += values.tolist() if place < len(parts) else []
        if training.world.is_sharded:
            model.reshard()
        for sample, row in zip(samples, chain.from_iterable(training.world.gather(found)), strict=True):
            sample[key] = row[: len(sample["input_ids"])]


def ended(row: list[int], end: int | None) -> list[int]:
    """The tokens up to the first `end`, which is an answer's last."""
    return row[: row.index(end) + 1] if end in row else row


def shifted(labels: Tensor) -> Tensor:
    """What each position predicts, (n, t)."""
    return pad(labels, (0, 1), value=IGNORE)[:, 1:]
