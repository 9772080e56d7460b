"""How near what a model wrote is to the reference, by the field's own scorers, with an interval over the examples.

n texts. No model is needed: `generations.jsonl` of a run is enough to score it again.
"""

from __future__ import annotations

import contextlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lorabench.spec.generate import ENDS, Generate

RESAMPLES = 1000
"""Of the examples, for an interval."""
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote to one prompt."""

    prompt: str
    reference: str
    output: str


def scores(answers: Sequence[Answer], generate: Generate) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The measures (`exact_match`, `exact_match_low`, …, `num_generated`), and each answer's own scores.

    Shares lie in [0, 1], BLEU and chrF in [0, 100]. An interval is of 95%: the 2.5th and 97.5th percentile of the
    metric over RESAMPLES samples of n answers, drawn with replacement by one seed.
    """
    found: dict[str, float] = {"num_generated": len(answers)}
    own: list[dict[str, float]] = [{} for _ in answers]
    for metric in generate.metrics:
        corpus = CORPUS.get(metric)
        each = [EACH[metric](answer.output, answer.reference, generate) for answer in answers]
        values = corpus(answers) if corpus else _of_mean(np.array(each))
        found |= {metric + end: float(value) for end, value in zip(ENDS, values, strict=True)}
        for row, score in zip(own, each, strict=True):
            row[metric] = score
    return found, own


def draws(n: int) -> np.ndarray:
    """How often each of n examples stands in each sample, (RESAMPLES, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)


def _of_mean(each: np.ndarray) -> tuple[float, float, float]:
    low, high = np.percentile(draws(len(each)) @ each / len(each), [2.5, 97.5])
    return each.mean(), low, high


def extracted(text: str, answer: str) -> str | None:
    """The last match of the pattern in the text, of that the first group that takes part; None: there is none.

    Of numbers with thousands' commas, a currency sign or a full stop behind them only the digits are compared.
    """
    matches = [*re.finditer(answer, text)]
    if not matches:
        return None
    groups = [group for group in matches[-1].groups() if group is not None]
    if matches[-1].re.groups and not groups:
        return None
    found = groups[0] if groups else matches[-1][0]
    return re.sub(r"(?<=\d),(?=\d{3})", "", found.strip().lstrip("$")).removesuffix(".").strip()


def normalized(text: str) -> str:
    """As SQuAD's evaluation has it: lower case, without punctuation and articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(output: str, reference: str, generate: Generate) -> float:
    """1 where both are one: of an `answer` what it finds in them, else the normalized texts."""
    if generate.answer is None:
        return float(normalized(output) == normalized(reference))
    found = extracted(output, generate.answer)
    return float(found is not None and found == extracted(reference, generate.answer))


def token_f1(output: str, reference: str, generate: Generate) -> float:
    """SQuAD's: the harmonic mean of precision and recall of the normalized words; of two empty texts 1."""
    ours, theirs = normalized(output).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))


def _rouge(kind: str) -> Callable[[str, str, Generate], float]:
    def score(output: str, reference: str, generate: Generate) -> float:
        return float(_rouge_scorer(kind).score(reference, output)[kind].fmeasure)

    return score


@cache
def _rouge_scorer(kind: str) -> Any:
    with contextlib.redirect_stderr(sys.__stderr__):
        # absl, which it imports, closes the stream that it finds here once some other library sets its own logging up
        from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


def _sentence_bleu(output: str, reference: str, generate: Generate) -> float:
    from sacrebleu import sentence_bleu

    return float(sentence_bleu(output, [reference]).score)


def _sentence_chrf(output: str, reference: str, generate: Generate) -> float:
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(output, [reference]).score)


def _bleu(answers: Sequence[Answer]) -> tuple[float, float, float]:
    from sacrebleu.metrics import BLEU

    return _of_corpus(BLEU(), answers)


def _chrf(answers: Sequence[Answer]) -> tuple[float, float, float]:
    from sacrebleu.metrics import CHRF

    return _of_corpus(CHRF(), answers)


def _of_corpus(metric: Any, answers: Sequence[Answer]) -> tuple[float, float, float]:
    """sacrebleu's score of all texts together, and of as many samples of them, from each text's own counts."""
    outputs, references = [answer.output for answer in answers], [[answer.reference for answer in answers]]
    value = metric.corpus_score(outputs, references).score
    counts = np.array(metric._extract_corpus_statistics(outputs, references))
    samples = [metric._compute_score_from_stats(row.tolist()).score for row in draws(len(counts)) @ counts]
    low, high = np.percentile(samples, [2.5, 97.5])
    return value, low, high


EACH: dict[str, Callable[[str, str, Generate], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": _sentence_bleu,
    "chrf": _sentence_chrf,
}
"""Of one text, by the metric's name."""
CORPUS = {"bleu": _bleu, "chrf": _chrf}
"""Those that are no mean over the texts."""
