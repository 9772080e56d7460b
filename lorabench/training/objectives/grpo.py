"""Reinforcement learning with a verifiable reward: answers of the model's own, better ones of a prompt made likelier.

GRPO, Shao et al. 2024, arXiv 2402.03300, section 4.1; the reward of an answer is the task's exact match.

Shapes: n answers of t positions, of which a mask tells the answer's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from lorabench.spec.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.spec.run_spec import RunSpec
    from lorabench.training.batches import Batches

EPSILON = 1e-4
"""Added to the deviation of a group's rewards, as TRL has it."""


@dataclass(frozen=True, kw_only=True)
class Grpo(Objective):
    """A step draws `group` answers to each of `batch_size / group` training prompts, as long as
    `task.generate.max_new_tokens`, and weighs each by its advantage: its reward less its group's mean, over the group's
    deviation.

    What the loss is a mean over has TRL's names: each answer's tokens, then the answers (`grpo`, the paper's); all
    tokens of the batch (`dapo`, Yu et al. 2025); or answers as if all had `max_new_tokens`, without the deviation too
    (`dr_grpo`, Liu et al. 2025).
    """

    writes: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = ("reward",)
    watched: ClassVar[tuple[str, bool]] = ("reward", False)
    columns: ClassVar[dict[str, str]] = {
        "reward": "mean reward of the step's answers",
        "reward_std": "standard deviation of their rewards",
        "zero_advantage_share": "share of the groups whose answers all have one reward",
        "answer_tokens": "mean number of tokens of an answer",
        "clipped": "share of the tokens whose ratio was clipped",
        "kl": "divergence from the untouched base (k3), where it is weighed",
    }

    group: Annotated[int, Ge(2)] = 8
    """Answers to a prompt."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of the draws, and of the probabilities that the loss is made of."""
    clip: Annotated[float, Gt(0), Lt(1)] = 0.2
    """How far from 1 a token's probability, over that at which it was drawn, may go for more reward."""
    kl: Annotated[float, Ge(0)] = 0.0
    """Weight of the divergence from the untouched base (k3 of Schulman 2020); above 0 a copy of it is held."""
    inner_steps: Annotated[int, Ge(1)] = 1
    """Optimizer steps that are taken on the same answers."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"

    def problems(self, spec: RunSpec) -> Iterator[str]:
        generate = spec.task.generation
        if spec.tasks:
            yield 'objective.name = "grpo": trains on one task; use task instead of tasks'
        elif spec.task.sequences != ("input_ids",):
            yield f'objective.name = "grpo": draws no answers of an encoder-decoder, task.name = "{spec.task.name}"'
        elif generate is None or "exact_match" not in generate.metrics:
            wanted = 'task.name = "completion" with task.generate = { metrics = ["exact_match"], … }'
            yield f'objective.name = "grpo": its reward is exact match, which the task does not measure; use {wanted}'
        if spec.padding == "free":
            yield 'padding = "free": objective grpo weighs its answers row by row; use padding = "longest"'
        if spec.batch_size % self.group:
            yield f"objective.group = {self.group}: must divide batch_size = {spec.batch_size}"

    def longest(self, spec: RunSpec) -> tuple[int, ...]:
        return (spec.seq_len + (spec.task.generation.max_new_tokens if spec.task.generation else 0),)

    def not_estimated(self, spec: RunSpec) -> str:
        copy = " and the copy of the base that kl is held against" if self.kl else ""
        return f"writing the answers that grpo trains on{copy}"

    def batches(self, training: Any, check: Callable[[], None]) -> Batches:
        from lorabench.training.rollouts import Rollouts

        return Rollouts(training, self, check)

    def metrics(self, rows: list[dict[str, float]]) -> dict[str, float]:
        return {"train_reward": sum(row["reward"] for row in rows) / len(rows)}

    def weights(self, lengths: Sequence[int], max_new_tokens: int) -> list[float]:
        """What each answer's summed loss is multiplied by, of a batch of answers of so many tokens."""
        tokens = {
            "grpo": [len(lengths) * length for length in lengths],
            "dapo": [sum(lengths)] * len(lengths),
            "dr_grpo": [len(lengths) * max_new_tokens] * len(lengths),
        }
        return [1 / each for each in tokens[self.loss]]

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of rewards (prompts, group), the same shape. A group's deviation is the unbiased one."""
        centred = rewards - rewards.mean(1, keepdim=True)
        return centred if self.loss == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + EPSILON)

    def policy_loss(
        self, now: Tensor, drawn: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, base: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its share of clipped tokens and divergence from the base, each by the same weights.

        Log-probabilities (n, t) now, when the answers were drawn, and of the base; advantages and weights (n,).
        """
        import torch

        ratio, gain = torch.exp(now - drawn), advantages[:, None]
        within = ratio.clamp(1 - self.clip, 1 + self.clip)
        each = -torch.minimum(ratio * gain, within * gain)
        about = {"clipped": (ratio * gain > within * gain).float()}
        if base is not None:
            about["kl"] = torch.exp(base - now) - (base - now) - 1
            each = each + self.kl * about["kl"]

        def mean(values: Tensor) -> Tensor:
            return ((values * mask).sum(1) * weights).sum()

        return mean(each), {key: mean(value.detach()) for key, value in about.items()}


EXAMPLE = Grpo(group=2)
