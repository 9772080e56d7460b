"""Classification of a text, or of a pair of texts, by a linear head on the model."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.tasks._classes import Classes
from lorabench.tasks._labelled import LabelledText


@dataclass(frozen=True, kw_only=True)
class Classification(Classes, LabelledText):
    """Labels are compared as text, of which 0, "0" and 0.0 are one; classes are the sorted ones of the training split.

    Numbers with a fraction, and more than two different ones that all have a decimal point, are scores: these are
    refused, for they are the task `regression`'s.
    """


EXAMPLE = Classification(data="builtin:questions", text="question", max_train=8, max_eval=4)
