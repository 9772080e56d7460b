"""Verdicts on claims: hand-made runs with known answers, and sweeps whose truth is known."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lorabench.config.decode import InputError, encode
from lorabench.report.claims import FAILS, HOLDS, OPEN, Verdict, claims_sheet, judge, read
from lorabench.report.comparisons import compare, outcome
from lorabench.report.results import Results, load_results, selected
from lorabench.report.tables import write_tables
from lorabench.spec.claim import Claim
from lorabench.spec.sweep import parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests.conftest import TOY

LORA, FULL = {"method": {"name": "lora"}}, {"method": {"name": "full"}}


def results_of(tmp_path: Any, measures: dict[tuple[Any, int], dict[str, float]], **more: Any) -> Results:
    """Runs of LoRA, by rank, and of full fine-tuning (rank None), done where `measures` has them: (rank, seed)."""
    seeds = sorted({seed for _, seed in measures})
    ranks = sorted({rank for rank, _ in measures if rank is not None})
    grid = [{"method": {"name": "lora", "rank": ranks}}] if ranks else []
    grid += [{"method": {"name": "full"}}] if any(rank is None for rank, _ in measures) else []
    sweep = parse_sweep({"base": TOY | {"seed": seeds}, "grid": grid} | more)
    results = load_results(Store(tmp_path), sweep)
    runs = results.runs.copy()
    keys = [
        (rank if rank == rank else None, seed)
        for rank, seed in zip(runs.get("method.rank", [None] * len(runs)), runs["seed"], strict=True)
    ]
    for name in {name for each in measures.values() for name in each}:
        runs[name] = [measures.get(key, {}).get(name, math.nan) for key in keys]
    runs["status"] = [Status.DONE if key in measures else "missing" for key in keys]
    return dataclasses.replace(results, runs=runs)


def losses(**sides: list[float]) -> dict[tuple[Any, int], dict[str, float]]:
    """`rank_4=[…]`, `full=[…]`: a value a seed."""
    return {
        (None if side == "full" else int(side.removeprefix("rank_")), seed): {"valid_loss": value}
        for side, values in sides.items()
        for seed, value in enumerate(values)
    }


def claim(**fields: Any) -> Claim:
    return Claim(**({"says": "so it is", "measure": "valid_loss"} | fields))


def verdict(found: Verdict) -> tuple[str, str]:
    return found.verdict, found.why


A, B = [2.31, 2.44, 2.28, 2.52], [2.20, 2.41, 2.19, 2.38]


def test_a_mean_a_ratio_and_a_difference_have_the_intervals_of_scipy(tmp_path: Any) -> None:
    results = results_of(tmp_path, losses(rank_4=A, full=B))
    one = judge(claim(where=LORA, at_most=3), results).estimate
    two = judge(claim(where=LORA, minus=FULL, at_most=1), results).estimate
    three = judge(claim(where=LORA, ratio_to=FULL, at_most=2), results).estimate
    assert one and two and three
    wanted = stats.t.interval(0.95, 3, np.mean(A), stats.sem(A))
    assert [one.low, one.high] == pytest.approx(wanted)
    assert [two.low, two.high] == pytest.approx(stats.ttest_rel(A, B).confidence_interval(0.95))
    assert [three.low, three.high] == pytest.approx(
        np.exp(stats.ttest_rel(np.log(A), np.log(B)).confidence_interval(0.95))
    )


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        ({"at_most": 2.9}, HOLDS), ({"at_least": 1.9}, HOLDS), ({"at_least": 1.9, "at_most": 2.9}, HOLDS),
        ({"at_most": 2.0}, FAILS), ({"at_least": 2.8}, FAILS), ({"at_least": 3, "at_most": 4}, FAILS),
        ({"at_most": 2.4}, OPEN), ({"at_least": 2.3}, OPEN), ({"at_least": 2.3, "at_most": 2.9}, OPEN),
    ],
)  # fmt: skip
def test_the_whole_interval_decides(bounds: dict[str, float], wanted: str, tmp_path: Any) -> None:
    found = judge(claim(where=LORA, **bounds), results_of(tmp_path, losses(rank_4=A)))
    assert found.verdict == wanted
    assert ("seeds would tell" in found.why) == (wanted == OPEN)


def test_so_many_seeds_would_tell_and_with_the_same_spread_they_do(tmp_path: Any) -> None:
    values = [2.0, 2.1, 2.2]
    found = judge(claim(where=LORA, at_most=2.2), results_of(tmp_path / "few", losses(rank_4=values)))
    needed = int("".join(filter(str.isdigit, found.why)))
    spread = np.tile([-1.0, 1.0], needed)[:needed]
    more = 2.1 + 0.1 * (spread - spread.mean()) / spread.std(ddof=1)
    assert (
        judge(claim(where=LORA, at_most=2.2), results_of(tmp_path / "more", losses(rank_4=list(more)))).verdict == HOLDS
    )


def test_one_seed_decides_only_what_is_counted(tmp_path: Any) -> None:
    measures = {
        (4, 0): {"valid_loss": 2.0, "num_trainable": 500.0},
        (None, 0): {"valid_loss": 3.0, "num_trainable": 1000.0},
    }
    results = results_of(tmp_path, measures)
    assert verdict(judge(claim(where=LORA, at_most=9), results)) == (OPEN, "1 seed has no interval; two or more do")
    counted = claim(measure="num_trainable", where=LORA, ratio_to=FULL, at_most=0.5)
    assert verdict(judge(counted, results)) == (HOLDS, "")
    assert judge(dataclasses.replace(counted, at_most=0.49), results).verdict == FAILS


def test_what_is_not_there_decides_nothing(tmp_path: Any) -> None:
    measures = losses(rank_4=A, full=[-1.0, 2.0, 2.0, 2.0])
    measures |= {(8, 0): {"peak_gib": 1.0}}
    results = results_of(tmp_path, measures)
    assert verdict(judge(claim(where={"method": {"rank": 8}}, at_most=9), results)) == (
        OPEN, "no run of \"where\" is done and has the measure",
    )  # fmt: skip
    assert verdict(judge(claim(where=LORA, ratio_to=FULL, at_most=9), results)) == (
        OPEN,
        "a ratio is of positive values",
    )


def test_a_setting_that_lacks_a_seed_is_left_out_and_named(tmp_path: Any) -> None:
    """Else the seeds' means would be over other settings: 1 and 9 for seed 0, 1 alone for seed 1."""
    measures = losses(rank_4=[1.0, 1.0, 1.1]) | {(8, 0): {"valid_loss": 9.0}}
    found = judge(claim(where=LORA, at_most=2), results_of(tmp_path, measures))
    assert verdict(found) == (HOLDS, "without lora, rank 8, which lacks seeds")
    assert found.estimate and found.estimate.value == pytest.approx(1.0333333)
    assert len(found.run_ids) == 3


def test_shares_are_percentages_and_lists_name_several_values(tmp_path: Any) -> None:
    measures = {
        (rank, seed): {"valid_accuracy": 0.5 + rank / 100 + seed / 1000} for rank in (1, 2, 9) for seed in range(3)
    }
    found = judge(
        claim(measure="valid_accuracy", where={"method": {"rank": [1, 2]}}, at_most=60), results_of(tmp_path, measures)
    )
    assert found.verdict == HOLDS and found.estimate and found.estimate.value == pytest.approx(51.6)


def test_table_and_file_say_the_same(tmp_path: Any) -> None:
    claims = [
        {"says": "LoRA is near full", "measure": "valid_loss", "where": LORA, "ratio_to": FULL, "at_most": 1.1},
        {"says": "LoRA | is $better$", "measure": "valid_loss", "where": LORA, "minus": FULL, "at_most": 0},
    ]  # fmt: skip
    results = results_of(tmp_path, losses(rank_4=A, full=B), claim=claims)
    sheet = claims_sheet(results)
    assert sheet is not None
    assert [row[4] for row in sheet.rows] == [HOLDS, FAILS]
    assert re.fullmatch(r"Validation loss, lora over full: 1\.04\d \[.*, .*\]", sheet.rows[0][1])
    write_tables(results, [sheet], tmp_path / "tables")
    found = read(tmp_path / "tables")
    assert [(row["claim"], row["verdict"]) for row in found] == [
        (c["says"], v) for c, v in zip(claims, (HOLDS, FAILS), strict=True)
    ]
    assert found[1]["low"] == pytest.approx(stats.ttest_rel(A, B).confidence_interval(0.95).low)
    assert found[1]["runs"].split() == list(results.runs.index)
    assert read(tmp_path) == []


def simulated(results: Results, draw: np.random.Generator, effect: float) -> Results:
    """Losses with a part of the seed's own, and noise; those of full are lower by `effect`."""
    own = {seed: draw.normal(2, 0.2) for seed in sorted(set(results.runs["seed"]))}
    noise = draw.normal(0, 0.05, len(results.runs))
    values = [own[seed] for seed in results.runs["seed"]] + noise - effect * (results.runs["method.name"] == "full")
    found = dataclasses.replace(results, runs=results.runs.assign(valid_loss=values, status=Status.DONE))
    vars(found)["keys"] = results.keys  # of the sweep; told anew they take half of a comparison's time
    return found


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Four settings of four seeds."""
    return results_of(tmp_path_factory.mktemp("store"), losses(rank_1=A, rank_4=A, rank_16=A, full=A))


@pytest.mark.parametrize("step", [1e-9, 0.1])
def test_of_a_thousand_sweeps_without_a_difference_one_in_twenty_seems_to_have_one(empty: Results, step: float) -> None:
    """Though the best of four settings was chosen, and all that are behind it are looked at; also of a measure that
    comes in steps as wide as it varies."""
    draw, false = np.random.default_rng(0), 0
    for _ in range(1000):
        results = simulated(empty, draw, 0.0)
        results.runs["valid_loss"] = step * (results.runs["valid_loss"] / step).round()
        found = compare(results, selected(results))
        assert found is not None
        false += any(item.is_told for item in found.others)
    assert false / 1000 <= 0.06


def test_a_difference_that_is_there_is_found_and_told(empty: Results) -> None:
    results = simulated(empty, np.random.default_rng(1), 0.6)
    told = outcome(results)
    assert told is not None
    assert told.sentences[0].startswith("Best is full: validation loss ")
    assert told.sentences[1].endswith(": more than chance.")
    assert set(told.sheet.tidy["p_holm"].dropna() < 0.05) == {True}
    found = compare(results, selected(results))
    assert found is not None and found.num_pairs == 6
    by_hand = results.runs.pivot_table(
        index="seed", columns=pd.Series(results.runs["method.rank"], dtype="object").fillna("full"), values="valid_loss"
    )
    for item in found.others:
        rank = item.other.runs["method.rank"].iloc[0]
        assert item.estimate.p == pytest.approx(stats.ttest_rel(by_hand["full"], by_hand[rank]).pvalue)


def test_with_one_seed_it_says_that_these_are_too_few(tmp_path: Any) -> None:
    results = results_of(tmp_path, losses(rank_1=[2.0], full=[1.0]))
    told = outcome(results)
    assert told is not None
    assert "not enough runs to tell (an interval takes two seeds of each)" in told.sentences[1]


def test_the_pages_distance_to_full_is_there_where_full_is_neither_best_nor_next(tmp_path: Any) -> None:
    results = results_of(tmp_path, losses(rank_1=[1.0, 1.1], rank_4=[1.2, 1.3], full=[2.0, 2.2]))
    told = outcome(results)
    assert told is not None
    assert [
        line
        for line in told.sentences
        if line.startswith("Full fine-tuning, full, is 1.050 nats behind (95% interval 0.4 to 1.7, p = ")
    ]


def test_answers_say_what_is_best_before_losses_do_and_the_test_split_before_validation(tmp_path: Any) -> None:
    names = ("valid_loss", "test_loss", "test_exact_match")
    for count, name in enumerate(names, 1):
        measures = {(rank, seed): dict.fromkeys(names[:count], rank / 10) for rank in (1, 2) for seed in (0, 1)}
        found = compare(results := results_of(tmp_path, measures), selected(results))
        assert found is not None and found.measure == name
        assert found.best.values[-1] == (2 if name == "test_exact_match" else 1)


def test_seeds_that_happen_to_be_alike_decide_nothing_but_of_counts(tmp_path: Any) -> None:
    """Accuracies come in steps: two seeds are a step apart in both by chance."""
    measures = {
        (rank, seed): {"valid_accuracy": 0.5 + (rank is None) / 16, "tensor_peak_gib": 1.0 + (rank is None)}
        for rank in (4, None)
        for seed in (0, 1)
    }
    results = results_of(tmp_path, measures)
    alike = (OPEN, "its 2 seeds are alike: no spread to judge by")
    assert verdict(judge(claim(measure="valid_accuracy", where=LORA, at_most=60), results)) == alike
    assert verdict(judge(claim(measure="valid_accuracy", where=FULL, minus=LORA, at_least=1), results)) == alike
    assert judge(claim(measure="tensor_peak_gib", where=LORA, ratio_to=FULL, at_most=0.5), results).verdict == HOLDS
    found, told = compare(results, selected(results)), outcome(results)
    assert found is not None and told is not None and not found.others[0].is_told
    assert "is 6.250 percentage points behind in each of 2 seeds: not enough runs to tell" in told.sentences[1]


def test_who_is_behind_overall_and_ahead_in_the_shared_seeds_is_told_so(tmp_path: Any) -> None:
    """The best has lost its worst seed: of the two that both have, the other was better."""
    results = results_of(tmp_path, losses(rank_1=[2.0, 2.1], full=[1.9, 2.02, 3.0]))
    told = outcome(results)
    assert told is not None
    assert told.sentences[0].startswith("Best is lora")
    assert "Full fine-tuning" not in told.sentences[1]
    assert "The next, full, is 0.09000 nats ahead in the seeds that both have (95% interval" in told.sentences[1]


def test_two_measures_of_the_same_runs_are_held_against_each_other(tmp_path: Any) -> None:
    swap, load = [0.010, 0.012, 0.011], [0.10, 0.13, 0.09]
    measures = {
        (4, seed): {"adapter_swap_seconds": a, "adapter_load_seconds": b}
        for seed, (a, b) in enumerate(zip(swap, load, strict=True))
    }
    own = claim(
        measure="adapter_swap_seconds", where=LORA, ratio_to=LORA | {"measure": "adapter_load_seconds"}, at_most=0.5
    )
    results = results_of(tmp_path, measures, claim=[encode(own)])
    found = judge(own, results)
    assert found.verdict == HOLDS and found.estimate
    logs = np.log(np.divide(swap, load))
    assert math.log(found.estimate.value) == pytest.approx(logs.mean())
    sheet = claims_sheet(results)
    assert sheet and "Adapter swap, lora over adapter load: 0.1" in str(sheet.rows[0][1])


SHARES = {"llama-2-7b": 4_194_304 / 6_738_415_616, "bert-base": (294_912 + 1_538) / 109_483_778}
"""Rank 8 on query and value: 2 x 2 x 8 x 4096 x 32 of Llama-2-7B's parameters; of BERT-base 2 x 2 x 8 x 768 x 12 and a
head of two classes, (768 + 1) x 2."""


@pytest.mark.parametrize(("shape", "share"), SHARES.items())
def test_a_claim_is_counted_on_the_shapes_of_a_well_known_model(shape: Any, share: float, tmp_path: Any) -> None:
    table = {
        "base": TOY | {"seed": [0, 1]},
        "grid": [{"method": {"name": "lora", "rank": 8, "targets": "query-value"}}, {"method": {"name": "full"}}],
    }
    results = load_results(Store(tmp_path), parse_sweep(table))  # no run is done, and none needs to be
    own = claim(measure="trainable_share", where=LORA, at_least=0.05, at_most=1, counted_on=shape)
    found = judge(own, results)
    assert found.estimate and found.estimate.value == pytest.approx(100 * share, rel=1e-9)
    assert found.verdict == HOLDS and "counted on the shapes of" in found.why
    assert judge(dataclasses.replace(own, at_most=0.06), results).verdict == FAILS
    stored = judge(claim(measure="storage_bytes", where=LORA, ratio_to=FULL, at_most=1, counted_on=shape), results)
    assert stored.estimate and stored.estimate.value == pytest.approx(share, rel=1e-9)


def test_memory_on_llama_2_7b_is_that_of_the_parts(tmp_path: Any) -> None:
    """Without the activations, which have the same size in each: a copy of the weights beside gradient and moments."""
    table = {
        "base": TOY,
        "grid": [
            {"method": {"name": "full"}},
            {"method": {"name": "lora", "rank": 8, "targets": "query-value"}, "quantization": ["none", "nf4"]},
        ],
    }
    results = load_results(Store(tmp_path), parse_sweep(table))

    def value(**fields: Any) -> float:
        found = judge(claim(measure="peak_gib", counted_on="llama-2-7b", at_most=0, **fields), results)
        assert found.estimate
        return found.estimate.value

    base, trained = 6_738_415_616, 4_194_304
    plain, quantized = LORA | {"quantization": "none"}, LORA | {"quantization": "nf4"}
    assert value(where=FULL, minus=plain) == pytest.approx((12 * base - 16 * trained) / 2**30)
    linear = base - 32000 * 4096 * 2 - (2 * 32 + 1) * 4096  # all but embedding, output and norms
    assert value(where=plain, minus=quantized) == pytest.approx((4 - 0.5 - 1 / 64) * linear / 2**30)


def test_what_cannot_be_counted_is_told(tmp_path: Any) -> None:
    table = {"base": TOY, "grid": [{"method": {"name": "bitfit"}}]}
    results = load_results(Store(tmp_path), parse_sweep(table))
    found = judge(claim(measure="num_trainable", at_most=1, counted_on="llama-2-7b"), results)
    assert found.verdict == OPEN and "bitfit" in found.why


def test_a_ratio_is_written_as_exactly_as_its_nearer_end_allows(tmp_path: Any) -> None:
    measures = losses(rank_4=[9.0, 1e-2, 9e3], full=[1.0, 1.0, 1.0])
    own = claim(where=LORA, ratio_to=FULL, at_most=1)
    sheet = claims_sheet(results_of(tmp_path, measures, claim=[encode(own)]))
    found = judge(own, results_of(tmp_path / "again", measures)).estimate
    assert sheet and found and found.low is not None and found.low < 0.01 < 9 < found.value
    assert f"over full: {found.value:.0f} [0, " in str(sheet.rows[0][1])


def test_settings_that_are_alike_in_every_seed_are_level(tmp_path: Any) -> None:
    results = results_of(tmp_path, losses(rank_4=[1.0, 1.0], full=[1.0, 1.0]))
    found = outcome(results)
    assert found and "is level with it in each of 2 seeds." in found.sentences[1]


def test_the_edge_is_of_what_is_done(tmp_path: Any) -> None:
    table = {
        "base": TOY | {"lr": [1e-3, 2e-3]},
        "grid": [{"method": {"name": "lora"}}, {"method": {"name": "full"}}],
        "select": {"over": "lr", "by": "valid_loss"},
    }
    results = load_results(Store(tmp_path), parse_sweep(table))
    assert list(selected(results).choices["edge"]) == [None, None]
    runs = results.runs.assign(status=Status.DONE, valid_loss=[2.0, 1.0, 1.0, math.nan])
    runs.loc[runs.index[3], "status"] = "missing"
    assert list(selected(dataclasses.replace(results, runs=runs)).choices["edge"]) == ["largest", None]


def test_an_edge_is_told_by_the_label_of_its_setting(tmp_path: Any) -> None:
    table = {
        "base": TOY | {"lr": [1e-3, 2e-3]},
        "grid": [{"label": "ours", "method": {"name": "lora"}}, {"label": "theirs", "method": {"name": "full"}}],
        "select": {"over": "lr", "by": "valid_loss"},
    }
    results = load_results(Store(tmp_path), parse_sweep(table))
    runs = results.runs.assign(status=Status.DONE, valid_loss=[2.0, 1.0, 1.0, 2.0])
    results = dataclasses.replace(results, runs=runs)
    found = outcome(results)
    assert found and found.sentences[-2:] == [
        "The best learning rate is the largest that was tried of ours (0.002): try further.",
        "The best learning rate is the smallest that was tried of theirs (0.001): try further.",
    ]


def test_the_learning_rate_that_select_chooses_is_a_measure_without_spread(tmp_path: Any) -> None:
    text = {"method": {"name": "lora"}, "lr": [1e-3, 1e-2, 1e-1]}, {"method": {"name": "full"}, "lr": [1e-4, 1e-3]}
    ten = {"says": "ten times", "measure": "lr", "where": LORA, "ratio_to": FULL, "at_least": 5, "at_most": 20}
    sweep = {"base": TOY | {"seed": [0, 1]}, "grid": [*text], "claim": [ten]}
    parsed = parse_sweep(sweep | {"select": {"over": "lr", "by": "valid_loss"}})
    results = load_results(Store(tmp_path), parsed)
    best = {"lora": 1e-2, "full": 1e-3}
    away = np.log(results.runs["lr"].astype(float) / results.runs["method.name"].map(best)).abs()
    runs = results.runs.assign(status=Status.DONE, valid_loss=2 + away + results.runs["seed"].astype(float) / 100)
    (claim,) = parsed.claims
    found = judge(claim, dataclasses.replace(results, runs=runs))
    assert found.verdict == HOLDS and found.estimate is not None
    assert (found.estimate.value, found.estimate.low) == (pytest.approx(10), pytest.approx(10))
    for other in ({}, {"select": {"over": "method.name", "by": "valid_loss"}}):
        with pytest.raises(InputError, match='claim 1: measure = "lr"'):
            parse_sweep(sweep | other)
