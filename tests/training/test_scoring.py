"""Scores of texts against the libraries that the field uses, and the definitions in words."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from scipy import stats

from lorabench.spec.generate import Generate
from lorabench.training.scoring import Answer, extracted, normalized, scores

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "another", "Dog,", "slept;", "and", "42", "birds", "sang"]


def answer(reference: str, output: str) -> Answer:
    return Answer(prompt="", reference=reference, output=output)


def texts(n: int, seed: int = 0) -> list[Answer]:
    """References of some words, and answers that share a good part of them."""
    generator, found = random.Random(seed), []
    for _ in range(n):
        reference = [generator.choice(WORDS) for _ in range(generator.randint(4, 12))]
        output = [word if generator.random() < 0.8 else generator.choice(WORDS) for word in reference]
        output = output[: generator.randint(1, len(output))] if generator.random() < 0.3 else output
        found.append(answer(" ".join(reference), " ".join(output)))
    return found


def squad_words(text: str) -> list[str]:
    """In words: lower the case; drop every punctuation mark; drop the words a, an, the; split at spaces."""
    kept = [c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
    return [word for word in "".join(kept).split() if word not in ("a", "an", "the")]


def test_the_squad_measures_are_what_their_words_say():
    answers = [
        *texts(60),
        Answer(prompt="", reference="The end.", output="the END"),
        Answer(prompt="", reference="", output=""),
    ]
    found, own = scores(answers, Generate(metrics=("exact_match", "token_f1")))
    exact, f1 = [], []
    for each in answers:
        ours, theirs = squad_words(each.output), squad_words(each.reference)
        exact.append(float(ours == theirs))
        left, shared = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = (shared / len(words) if words else 0.0 for words in (ours, theirs))
        f1.append(2 * precision * recall / (precision + recall) if shared else float(ours == theirs == []))
    assert [row["exact_match"] for row in own] == exact and sum(exact) > 2
    assert [row["token_f1"] for row in own] == pytest.approx(f1)
    assert found["exact_match"] == pytest.approx(np.mean(exact)) and found["token_f1"] == pytest.approx(np.mean(f1))
    assert found["num_generated"] == len(answers)


def test_rouge_is_its_library_s():
    answers = texts(40)
    found, own = scores(answers, Generate(metrics=("rouge1", "rouge2", "rougeL")))
    from rouge_score.rouge_scorer import RougeScorer  # once ours has imported it without harm

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    want = [scorer.score(answer.reference, answer.output) for answer in answers]
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert [row[kind] for row in own] == [each[kind].fmeasure for each in want]
        assert found[kind] == pytest.approx(np.mean([each[kind].fmeasure for each in want]))


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU), ("chrf", CHRF)])
def test_corpus_scores_are_sacrebleu_s_and_so_are_their_samples(name, metric):
    answers = texts(30)
    found, _ = scores(answers, Generate(metrics=(name,)))
    outputs, references = [a.output for a in answers], [a.reference for a in answers]
    assert found[name] == metric().corpus_score(outputs, [references]).score
    generator, samples = np.random.default_rng(5), []
    for _ in range(400):
        chosen = generator.integers(0, 30, 30)
        samples.append(metric().corpus_score([outputs[i] for i in chosen], [[references[i] for i in chosen]]).score)
    low, high = np.percentile(samples, [2.5, 97.5])
    assert found[f"{name}_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert found[f"{name}_high"] == pytest.approx(high, abs=0.15 * (high - low))


CLOSED = """
import io, logging.config, sys
from lorabench.spec.generate import Generate
from lorabench.training.scoring import Answer, scores
log = sys.stderr = io.StringIO()
answer = Answer(prompt="", reference="a b", output="a")
assert scores([answer], Generate(metrics=("rouge1",)))[0]["rouge1"] == 2 / 3
sys.stderr = sys.__stderr__
logging.config.dictConfig({"version": 1})
assert not log.closed
"""


def test_the_log_of_a_run_stays_open_when_logging_is_set_up():
    """absl, which rouge-score imports, would close what stood in the place of stderr then."""
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interval_is_scipy_s_bootstrap():
    answers = texts(200)
    found, own = scores(answers, Generate(metrics=("token_f1",)))
    values = [row["token_f1"] for row in own]
    want = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert found["token_f1_low"] == pytest.approx(want.low, abs=3e-3)
    assert found["token_f1_high"] == pytest.approx(want.high, abs=3e-3)
    assert scores(answers, Generate(metrics=("token_f1",)))[0] == found  # the same each time


@pytest.mark.parametrize(
    ("text", "pattern", "want"),
    [
        ("so 5 * 3 = 15\n#### 1,015.", r"#### (\S+)", "1015"),
        ("= 3 then = 4", r"= (-?\d+)", "4"),
        ("it costs $12,300,000", r"\$?[\d,]+", "12300000"),
        ("1,2 and 3", r"\d,\d", "1,2"),
        ("no number", r"\d+", None),
        ("yes", "yes|no", "yes"),
        ("x ", r"(y)?x", None),
        ("A: 3 B: no", r"A: (\d+)|B: (\w+)", "no"),
    ],
)
def test_what_is_compared_of_an_answer(text, pattern, want):
    assert extracted(text, pattern) == want


def test_an_answer_that_is_not_there_is_wrong():
    generate = Generate(answer=r"#### (-?[\d,.]+)")
    answers = [
        Answer(prompt="", reference="a\n#### 72", output=output)
        for output in ("b\n#### 72.", "72", "#### 7", "#### 72\n#### 1")
    ]
    assert [row["exact_match"] for row in scores(answers, generate)[1]] == [1.0, 0.0, 0.0, 0.0]


def test_normalized_words():
    assert normalized("  The  quick, brown fox; AN end. theatre") == "quick brown fox end theatre"
    assert not re.search(r"\s\s", normalized("a  a  a b"))


def test_all_right_and_all_wrong_have_intervals_without_width():
    same, wrong = [answer("x y z w", "x y z w")] * 5, [answer("x y z w", "p")] * 5
    metrics = ("exact_match", "token_f1", "rouge1", "rougeL", "bleu", "chrf")
    best, worst = (scores(answers, Generate(metrics=metrics))[0] for answers in (same, wrong))
    for metric in metrics:
        most = 100 if metric in ("bleu", "chrf") else 1
        assert [best[metric + end] for end in ("", "_low", "_high")] == pytest.approx([most] * 3)
        assert [worst[metric + end] for end in ("", "_low", "_high")] == pytest.approx([0] * 3)
