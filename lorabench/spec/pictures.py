"""What a diffusion run draws after training, and what that is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from lorabench.config.quote import show


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """After training the tuned model draws each prompt, and the untouched base does, from the same noise."""

    prompts: tuple[str, ...] = ()
    """What is drawn of what was trained: texts, or classes' numbers (none: what the held-out images show)."""
    unrelated: tuple[str, ...] = ()
    """What is drawn besides, of which nothing was trained: by these the drift from the base is measured."""
    each: Annotated[int, Ge(1)] = 4
    """Pictures a prompt."""
    steps: Annotated[int, Ge(1)] = 20
    """Of the sampler, which is the pipeline's own scheduler."""
    guidance: Annotated[float, Ge(0)] = 2.0
    """Classifier-free guidance; 1: none."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Of the noise that the first picture begins with; the next has the next one."""
    encoder: str = "builtin:tiny-vit"
    """A vision model, by whose features images are compared: `facebook/dinov2-base` and its kin."""
    encoder_block: Annotated[int, Ge(1)] | None = None
    """Features are all patches behind this block, end to end (None: the class token behind the last one)."""
    classifier: str | None = None
    """An image classifier that tells of what class a picture is, prompts being classes' numbers (None: none does)."""

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        for key in ("prompts", "unrelated"):
            named = getattr(self, key)
            if len(set(named)) < len(named):
                yield f"{key} = {show(list(named))}: names one twice"
        both = [prompt for prompt in self.unrelated if prompt in self.prompts]
        if both:
            yield f"unrelated = {show(list(self.unrelated))}: {show(both[0])} is among the prompts, too"

    @property
    def reports(self) -> tuple[str, ...]:
        """The names of what is measured."""
        return (
            "picture_similarity", "base_picture_similarity", "train_similarity",
            *(("picture_drift", "picture_drift_null") if self.unrelated else ()),
            *(("picture_accuracy", "base_picture_accuracy") if self.classifier else ()),
        )  # fmt: skip
