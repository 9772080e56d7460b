"""Rank advice: held against PEFT's own matching, and against norms of what a truncation leaves out."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorabench.updates.advice import rank_pattern_for, smallest_rank

NAMES = st.lists(st.sampled_from(["a", "b", "ab", "a+", "0", "1", "10", "q_proj"]), min_size=1, max_size=4)
LAYERS = st.builds(".".join, NAMES)


def ranks_in_peft(layers, usual, pattern):
    return {layer: pattern.get(get_pattern_key(pattern.keys(), layer), usual) for layer in layers}


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(LAYERS, st.integers(1, 4), min_size=1, max_size=12))
@example({"attn.c_proj": 3, "mlp.c_proj": 2, "attn.d": 1, "0.c_proj": 3, "d": 1, "0.d": 1})
@example({"layers.0.q": 1, "model.layers.0.q": 2, "k": 3})
@example({"a.b": 1, "axb": 2, "c.a.b": 1})
def test_the_pattern_gives_every_layer_its_rank_in_peft(ranks):
    usual, pattern = rank_pattern_for(ranks)
    assert ranks_in_peft(ranks, usual, pattern) == ranks
    saved = dict(sorted(pattern.items()))  # as PEFT's `save_pretrained` writes them
    assert ranks_in_peft(ranks, usual, saved) == ranks


def test_one_rank_needs_no_pattern():
    assert rank_pattern_for({"model.layers.0.q_proj": 4, "model.layers.0.v_proj": 4}) == (4, {})


def test_the_pattern_is_short():
    """Twelve blocks: queries all alike, values alike but for three, up-projections alike but for one."""
    ranks = {}
    for i in range(12):
        ranks[f"model.layers.{i}.self_attn.q_proj"] = 2
        ranks[f"model.layers.{i}.self_attn.v_proj"] = 5 if i in (0, 3, 11) else 4
        ranks[f"model.layers.{i}.mlp.up_proj"] = 2 if i == 1 else 8
        ranks[f"model.layers.{i}.mlp.gate_proj"] = 8
    assert rank_pattern_for(ranks) == (
        8,
        {"q_proj": 2, "(0|3|11).self_attn.v_proj": 5, "v_proj": 4, "1.mlp.up_proj": 2},
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.99, 1.0])
def test_the_smallest_rank_keeps_the_energy_and_one_less_does_not(energy):
    random = np.random.default_rng(0)
    for shape in [(9, 7), (5, 12), (30, 30)]:
        W = random.standard_normal(shape) * np.exp(-np.arange(shape[1]))
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        k = smallest_rank(S, energy)
        kept = [np.linalg.norm(U[:, :n] * S[:n] @ Vh[:n]) ** 2 / np.linalg.norm(W) ** 2 for n in (k, k - 1)]
        assert kept[0] >= energy - 1e-9 and kept[1] < energy


def test_of_nothing_and_of_equal_values():
    assert smallest_rank(np.zeros(4), 0.9) == 1
    assert smallest_rank(np.full(10, 1e-200), 0.9) == 9
