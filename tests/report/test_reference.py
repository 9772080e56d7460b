"""What the shipped results must show: `results/reference/methods`, made by `sweeps/methods.toml`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lorabench.spec.sweep import read_sweep

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference" / "methods"


@pytest.fixture(scope="module")
def table():
    """One row a method, one column a measure, each with its mean, low and high."""
    frame = pd.read_csv(REFERENCE / "tables" / "summary.csv").set_index(["label", "measure"])
    return frame[["mean", "low", "high", "n"]].unstack("measure")


def test_it_was_made_by_the_sweep_as_it_is(table):
    assert (REFERENCE / "sweep.toml").read_text() == (ROOT / "sweeps" / "methods.toml").read_text()
    labels = set(read_sweep(ROOT / "sweeps" / "methods.toml").labels.values())
    assert set(table.index) == labels
    assert (table["n"]["valid_loss"] == 3).all()


def test_every_method_beats_the_untouched_base(table):
    assert (table["high"]["valid_loss"] < table["mean"]["base_valid_loss"]).all()


def test_full_and_lora_at_high_rank_are_within_their_intervals(table):
    low, high = table["low"]["valid_loss"], table["high"]["valid_loss"]
    full, lora = "full fine-tuning", "LoRA, rank 64"
    assert low[lora] <= high[full] and low[full] <= high[lora]


def test_rank_helps_and_quantization_costs_little(table):
    mean = table["mean"]["valid_loss"]
    assert mean["LoRA, rank 64"] < mean["LoRA, rank 8"]
    assert abs(mean["QLoRA (nf4)"] - mean["LoRA, rank 8"]) < 0.05
