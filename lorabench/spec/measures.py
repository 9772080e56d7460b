"""Every number that a run's record can hold: its unit, whether more is better, and what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number of a record: its unit, whether more is better (None: neither), and what it is."""

    unit: str
    higher_is_better: bool | None
    text: str
    group: str


BATCH_SIZES = (1, 8)
"""At which inference is measured."""


NUM_RESIDENT = 4
"""Adapters that a model holds at once where mixed batches and swaps are measured."""


def _measures(group: str, *rows: tuple[str, str, bool | None, str]) -> dict[str, Measure]:
    return {name: Measure(unit, better, text, group) for name, unit, better, text in rows}


OWN_IN_A_PACK = ("model_gib", "optimizer_state_gib", "flops_per_step")
"""Of the measures of memory and throughput, those that are a run's own whomever it is computed with."""


def is_shared_in_a_pack(name: str) -> bool:
    """Whether a run that is computed in a pack has only its share of what all of it took."""
    group = MEASURES[name].group if name in MEASURES else ""
    return group in ("memory", "throughput", "seconds") and name not in OWN_IN_A_PACK


def _scored(split: str, what: str) -> Iterator[tuple[str, str, bool | None, str]]:
    """What tasks count of their predictions on a split; `what` it is in words."""
    yield from (
        (f"{split}_{metric}", unit, better, f"{text}, {what}")
        for metric, unit, better, text in (
            ("token_accuracy", "%", True, "tokens predicted right"),
            ("accuracy", "%", True, "examples classified, or questions answered, right"),
            ("accuracy_norm", "%", True, "questions answered right by log-likelihood per character"),
            ("accuracy_byte", "%", True, "questions answered right by log-likelihood per byte"),
            ("accuracy_token", "%", True, "questions answered right by log-likelihood per token"),
            ("macro_f1", "%", True, "mean F1 of the classes that occur or are predicted, unweighted"),
            ("matthews", "", True, "Matthews correlation coefficient"),
            ("pearson", "", True, "Pearson correlation of predictions and scores"),
            ("spearman", "", True, "Spearman rank correlation of predictions and scores"),
            ("majority", "%", None, "accuracy of always answering the most frequent class"),
        )
        if (split, metric) != ("base_valid", "majority")  # which is no model's
    )


def _generated() -> Iterator[tuple[str, str, bool | None, str]]:
    """How near what a model writes is to the reference, with an interval over the examples; of the base too."""
    metrics = {
        "exact_match": ("%", "answers that are the reference's"),
        "token_f1": ("%", "mean F1 of the answers' words"),
        "rouge1": ("%", "mean ROUGE-1 (F) of the answers"),
        "rouge2": ("%", "mean ROUGE-2 (F) of the answers"),
        "rougeL": ("%", "mean ROUGE-L (F) of the answers"),
        "bleu": ("", "BLEU of all answers together, 0 to 100"),
        "chrf": ("", "chrF of all answers together, 0 to 100"),
    }
    ends = {"": "", "_low": ": lower end of the 95% interval over the examples", "_high": ": its upper end"}
    for split, name in {"valid": "validation", "test": "test"}.items():
        for key, who in {split: name, f"base_{split}": f"{name}, the untouched base"}.items():
            yield f"{key}_num_generated", "", None, f"answers that were written, {who}"
            for metric, (unit, what) in metrics.items():
                yield from ((f"{key}_{metric}{end}", unit, True, f"{what}, {who}{also}") for end, also in ends.items())


def _inference() -> Iterator[tuple[str, str, bool | None, str]]:
    """Latency and throughput of base, unmerged and merged model, and what the latter two add to the base's latency."""
    parts = {"prefill": "to the first token of a batch of prompts", "decode": "from one generated token to the next"}
    for size in BATCH_SIZES:
        batch = f"{size} at a time" if size > 1 else "one at a time"
        for part, what in parts.items():
            for model in ("base", "unmerged", "merged"):
                key, who = f"{part}_{model}_batch_{size}", f"{model} model, {batch}"
                yield f"{key}_seconds", "s", False, f"median time {what}: {who}"
                yield f"{key}_tokens_per_second", "tokens/s", True, f"tokens per second of {part}: {who}"
                if part == "prefill":
                    yield f"{key}_images_per_second", "images/s", True, f"images per second: {who}"
                if model != "base":
                    text = f"{part} time over the base's, less 1: {who}; median over pairs of calls"
                    yield f"added_{key}", "%", False, text


def _drifts() -> Iterator[tuple[str, str, bool | None, str]]:
    """How far training has moved layers and predictions, on the task and on what is retained."""
    for key, what in {"task": "the task", "retain": "what is retained"}.items():
        yield f"drift_{key}", "", None, f"E‖ΔW h‖² / E‖W0 h‖² on {what}, mean over the linear layers that have changed"
        yield f"drift_{key}_null", "", None, f"the same on {what} of random changes of the same norms"
        yield f"kl_{key}", "nats", None, f"KL(base ‖ tuned) a predicted token on {what}"


MEASURES: dict[str, Measure] = (
    _measures(
        "counts",
        ("num_parameters", "", None, "parameters of the model as it computes, the method's own included"),
        ("num_trainable", "", False, "parameters that are trained"),
        ("trainable_share", "%", False, "trained parameters as a percentage of the untouched base model's"),
        ("num_train_examples", "", None, "training examples"),
    )
    | _measures(
        "memory",
        ("peak_gib", "GiB", False, "highest of the training phases: CUDA allocated, or CPU above the baseline"),
        ("all_ranks_peak_gib", "GiB", False, "of a run on several ranks, the sum of their peak_gib"),
        ("load_peak_gib", "GiB", False, "peak while the base is loaded and quantized"),
        ("forward_backward_peak_gib", "GiB", False, "peak of forward and backward"),
        ("optimizer_peak_gib", "GiB", False, "peak of the optimizer step"),
        ("draw_peak_gib", "GiB", False, "peak of drawing pictures, by the tuned model and the base; of no other peak"),
        ("rollout_peak_gib", "GiB", False, "peak of writing the answers that are trained on (GRPO)"),
        ("reserved_peak_gib", "GiB", False, "CUDA: peak that the allocator reserved"),
        ("tensor_peak_gib", "GiB", False, "CPU: most bytes of live tensors in a step, whatever the allocator keeps"),
        ("baseline_gib", "GiB", None, "CPU: resident before the base was loaded; not part of the peaks"),
        (
            "model_gib",
            "GiB",
            False,
            "bytes of the model's parameters and buffers, the scales of quantized weights included",
        ),
        ("optimizer_state_gib", "GiB", False, "bytes of the optimizer's state"),
    )
    | _measures(
        "throughput",
        ("tokens_per_second", "tokens/s", True, "non-padding tokens per second of training step, warm-up left out"),
        ("padded_tokens_per_second", "tokens/s", None, "the same with padding counted"),
        (
            "images_per_second",
            "images/s",
            True,
            "images per second of training step, warm-up left out, instead of tokens",
        ),
        ("label_tokens_per_second", "tokens/s", None, "the same, only what the loss is taken over"),
        ("step_seconds_median", "s", False, "median time of an optimizer step"),
        ("step_seconds_p95", "s", False, "95th percentile of the time of an optimizer step"),
        (
            "flops_per_step",
            "FLOP",
            None,
            "model FLOPs of a step: matrix products, padding included and recomputation apart",
        ),
        (
            "model_flops_utilization",
            "%",
            True,
            "model FLOPs per second as a percentage of the highest rate known of the device",
        ),
        ("energy_joules", "J", False, "of training, where NVML or RAPL tells"),
    )
    | _measures(
        "storage",
        ("updates_bytes", "bytes", False, "size on disk of what was learned"),
    )
    | _measures(
        "seconds",
        ("load_seconds", "s", False, "wall time to load the base and the data"),
        ("train_seconds", "s", False, "wall time of the training steps"),
        (
            "rollout_seconds",
            "s",
            False,
            "wall time of writing the answers that are trained on (GRPO), of no step's time",
        ),
        ("evaluate_seconds", "s", False, "wall time of evaluation"),
        ("generate_seconds", "s", False, "wall time of writing answers and scoring them"),
        ("draw_seconds", "s", False, "wall time of drawing pictures, and of looking at them"),
        ("snapshot_seconds", "s", False, "wall time of keeping snapshots of ΔW while training"),
        ("drift_seconds", "s", False, "wall time of measuring drift and KL"),
        ("serve_seconds", "s", False, "wall time of measuring inference, merging, loading and swapping"),
        ("total_seconds", "s", False, "wall time of the run"),
    )
    | _measures(
        "serving",
        *_inference(),
        ("merge_error", "", False, "largest difference of a merged and an unmerged logit over the logits' deviation"),
        ("storage_bytes", "bytes", False, "files that one more task needs: the adapter, or all of ΔW"),
        ("adapter_load_seconds", "s", False, "time from disk onto the resident base"),
        ("adapter_swap_seconds", "s", False, "time to switch the resident base from one task to another"),
        ("resident_adapter_gib", "GiB", False, "memory for each further task on the resident base"),
        ("mixed_batch_seconds", "s", False, f"a batch of 8 prompts for {NUM_RESIDENT} adapters in one pass"),
        ("swapped_batch_seconds", "s", False, "the same batch adapter by adapter, with a swap before each"),
    )
    | _measures(
        "metrics",
        ("train_loss", "nats", False, "mean training loss of the last tenth of the steps"),
        ("train_reward", "%", True, "mean reward of the answers of the last tenth of the steps (GRPO)"),
        ("train_climb", "%", False, "how far the smoothed training loss (GRPO: the reward) went back behind its start"),
        ("train_climb_errors", "", False, "the same in standard errors, of batches being harder or easier"),
        ("unstable", "%", False, "runs whose training loss climbed, or ended above its lowest (training/stability.py)"),
        ("base_valid_loss", "nats", False, "validation loss of the untouched base"),
        *_scored("base_valid", "validation, the untouched base"),
        (
            "valid_loss",
            "nats",
            False,
            "validation loss after training; of regression and denoising the mean squared error",
        ),
        ("valid_perplexity", "", False, "exp(valid_loss)"),
        *_scored("valid", "validation"),
        ("test_loss", "nats", False, "test loss after training"),
        ("test_perplexity", "", False, "exp(test_loss)"),
        *_scored("test", "test"),
        *_generated(),
        ("retain_loss_before", "nats", False, "loss of the untouched base on the retention set"),
        ("retain_loss_after", "nats", False, "loss on the retention set after training"),
        ("forgetting", "nats", False, "retain_loss_after - retain_loss_before"),
    )
    | _measures(
        "pictures",
        ("picture_similarity", "", True, "cosine of the features of pictures and of held-out images of their prompts"),
        ("base_picture_similarity", "", True, "the same of the untouched base's pictures"),
        ("train_similarity", "", None, "the same of images that were trained on: what a perfect copy would have"),
        ("picture_drift", "", False, "(1 - cosine of base's and tuned model's pictures) / 2, on unrelated prompts"),
        ("picture_drift_null", "", None, "the same of two pictures of the base, of one prompt, from different noise"),
        ("picture_accuracy", "%", True, "pictures that a classifier tells to be of their class"),
        ("base_picture_accuracy", "%", True, "the same of the untouched base's pictures"),
    )
    | _measures("drift", *_drifts())
    | _measures(  # R[i][j]: accuracy on task j, or share of its tokens predicted right, after training on i of T tasks
        "sequence",
        ("average_final", "%", True, "mean over the tasks j of R[T][j], validation"),
        ("backward_transfer", "%", True, "mean over j < T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato 2017)"),
        ("forward_transfer", "%", True, "mean over j > 1 of R[j-1][j] - R[0][j], 0 being the untouched base"),
        ("sequence_forgetting", "%", False, "mean over j < T of max R[l][j] (1 <= l < T) - R[T][j] (Chaudhry 2018)"),
    )
)
"""Every number that a record can hold. Percentages are kept as shares in [0, 1] and printed times 100."""


OWN = tuple(name.removeprefix("test_") for name in MEASURES if name.startswith("test_"))
"""What can be measured on a test set."""
_OF_SET = re.compile(
    rf"(?P<kind>test|retain)_(?P<set>[a-z][a-z0-9_]*?)_(?P<metric>{'|'.join(OWN)})(?P<when>_before|_after)?"
)
_FORGETTING = re.compile(r"forgetting_(?P<set>[a-z][a-z0-9_]*)")


INTERVENED = "intervened."
"""How a measure begins that a run has with its intruder dimensions scaled: `intervened.forgetting`."""


def find(name: str) -> Measure | None:
    """The measure of that name, also of one of a task's own test or retention sets: `test_boolq_accuracy`,
    `retain_docs_loss_before`, `forgetting_docs`; and of what `lorabench intervene` has evaluated; None where there is
    none."""
    name = name.removeprefix(INTERVENED)
    if name in MEASURES:
        return MEASURES[name]
    if match := _FORGETTING.fullmatch(name):
        return Measure("nats", False, f"loss on {match['set']} after training, less that before it", "metrics")
    match = _OF_SET.fullmatch(name)  # the shortest name of a set that leaves a metric
    if match is None or (match["kind"] == "retain") != bool(match["when"]):
        return None
    known = MEASURES[f"test_{match['metric']}"]
    when = {"_before": ", the untouched base", "_after": ", after training"}.get(match["when"] or "", "")
    what = "mean over the test sets" if match["set"] == "mean" else f"{match['kind']} set {match['set']}"
    text = known.text.removesuffix(", test").removesuffix(" after training").removeprefix("test ")
    return Measure(known.unit, known.higher_is_better, f"{text}, {what}{when}", "metrics")


def of_sets(others: Mapping[str, Iterable[str]]) -> dict[str, Measure]:
    """Those of a task's sets: `test_NAME` or `retain_NAME` -> what is measured on it."""
    tested = {split: names for split, names in others.items() if split.startswith("test_")}
    everywhere = set.intersection(*map(set, tested.values())) if tested else set()
    names = [f"{split}_{metric}" for split, metrics in tested.items() for metric in metrics]
    names += [f"test_mean_{metric}" for metric in everywhere]
    for split, metrics in others.items():
        if split.startswith("retain_"):
            names += [f"{split}_{metric}{when}" for metric in metrics for when in ("_before", "_after")]
            names.append(f"forgetting_{split.removeprefix('retain_')}")
    return {name: measure for name in names if (measure := find(name)) is not None}
