"""Some of what the models of a sweep have written, right and wrong, to be read."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from lorabench.config.decode import InputError
from lorabench.report.aggregate import plain
from lorabench.report.labels import series_label, shown_factor
from lorabench.report.results import Results, grouped
from lorabench.store.generations import Generation, read_generations

EACH = 2
"""So many right ones of a setting are shown, and so many wrong ones."""
MOST_SETTINGS = 24


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A setting's run, and some of its answers: `{"prompt", "reference", "output", "score"}`."""

    setting: str
    run_id: str
    about: str
    answers: list[dict[str, str]]


def read_answers(results: Results) -> list[Shown]:
    """Of the first run of each setting that is compared and has written; a file that cannot be read shows nothing."""
    found: list[Shown] = []
    for values, runs in grouped(results.selection.done, results.settings):
        read = ((run_id, _read(results.written[run_id])) for run_id in runs.index if run_id in results.written)
        run_id, answers = next((pair for pair in read if pair[1]), (None, []))
        if run_id is not None and len(found) < MOST_SETTINGS:
            found.append(_shown(series_label(results.settings, list(values)), str(run_id), answers))
    return found


def _read(file: Path) -> list[Generation]:
    """What a run has written on the test split, else on validation, else on the last set that it wrote to."""
    try:
        found = read_generations(file)
    except (OSError, InputError):
        return []
    splits = [answer.split for answer in found]
    shown = next((split for split in ("test", "validation") if split in splits), splits[-1] if splits else "")
    return [answer for answer in found if answer.split == shown and answer.scores]


def _shown(setting: str, run_id: str, found: list[Generation]) -> Shown:
    """The better and the worse half by the first metric, of each some by a seed."""
    metric = next(iter(found[0].scores))
    factor = shown_factor(f"test_{metric}")
    scores = [answer.scores.get(metric, 0.0) for answer in found]
    middle = 1.0 if metric == "exact_match" else sorted(scores)[len(scores) // 2]
    chosen = random.Random(0)
    answers: list[dict[str, str]] = []
    for better in (True, False):
        half = [pair for pair in zip(found, scores, strict=True) if (pair[1] >= middle) == better]
        for answer, score in sorted(chosen.sample(half, min(EACH, len(half))), key=lambda pair: pair[0].number):
            texts = {"prompt": answer.prompt, "reference": answer.reference, "output": answer.output}
            answers.append(texts | {"score": plain(factor * score)})
    mean = plain(factor * sum(scores) / len(scores))
    each = "each answer's own " if metric in ("bleu", "chrf") else ""
    about = f"{each}{metric.replace('_', ' ')}, mean {mean} over {len(found)} answers, {found[0].split} split"
    return Shown(setting=setting, run_id=run_id, about=about, answers=answers)
