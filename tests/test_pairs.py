import tomllib

from lorabench.pairs import find_pairs
from lorabench.spec import flatten
from lorabench.sweep import parse_sweep

AXES = ("method.rank", "seed")


def sweep(text):
    return parse_sweep(tomllib.loads(text), text)


def named(sweep, pairs, *keys):
    flats = {spec.id: flatten(spec.to_json()) for spec in sweep.runs}
    return {
        (p.axis, *(tuple(flats[run].get(key) for key in keys) for run in (p.run_a, p.run_b))): (p.value_a, p.value_b)
        for p in pairs
    }


GRID = """
[base]
task.name = "text"
seed = [0, 1, 2]
[[grid]]
method.name = "lora"
method.rank = [16, 2]
lr = [1e-3, 3e-3]
[[grid]]
method.name = "full"
"""


def test_pairs_differ_in_one_axis_only():
    s = sweep(GRID)
    pairs = list(find_pairs(s, {spec.id for spec in s.runs}, AXES))
    found = named(s, pairs, "method.name", "method.rank", "lr", "seed")
    assert len(found) == len(pairs) == 3 * 2 + 3 * (2 * 2 + 1)
    for (axis, a, b), values in found.items():
        position = {"method.rank": 1, "seed": 3}[axis]
        assert values == (a[position], b[position]) and values[0] < values[1]
        assert a[:position] + a[position + 1 :] == b[:position] + b[position + 1 :]


def test_only_the_runs_given_and_the_axes_asked():
    s = sweep(GRID)
    lora = [spec.id for spec in s.runs if spec.method.name == "lora" and spec.seed < 2]
    assert {p.axis for p in find_pairs(s, lora, ("seed",))} == {"seed"}
    assert len(list(find_pairs(s, lora, ("seed",)))) == 4
    assert not list(find_pairs(s, lora[:1], AXES))


def test_selected_runs_are_compared_across_the_selected_key():
    s = sweep(GRID + '[select]\nover = "lr"\n')
    flats = {spec.id: flatten(spec.to_json()) for spec in s.runs}
    best = {2: 3e-3, 16: 1e-3}
    chosen = {run for run, flat in flats.items() if best.get(flat.get("method.rank")) == flat["lr"]}
    pairs = named(s, find_pairs(s, flats, AXES, chosen), "method.rank", "lr", "seed")
    ranks = {key for key in pairs if key[0] == "method.rank"}
    assert ranks == {("method.rank", (2, 3e-3, seed), (16, 1e-3, seed)) for seed in range(3)}
    assert len(pairs) == 3 + 2 * 3
    assert not [p for p in find_pairs(s, chosen, AXES) if p.axis == "method.rank"], "without a selection lr differs"


def test_zipped_keys_are_one_axis():
    text = """
    [base]
    task.name = "text"
    [[grid]]
    method.name = "lora"
    method.rank = [2, 8]
    method.alpha = [4, 16]
    """
    crossed, zipped = sweep(text), sweep(text + 'zip = ["method.rank", "method.alpha"]\n')
    for s, expected in ((crossed, {((2, 4), (8, 4)), ((2, 16), (8, 16))}), (zipped, {((2, 4), (8, 16))})):
        pairs = named(s, find_pairs(s, {spec.id for spec in s.runs}, AXES), "method.rank", "method.alpha")
        assert {key[1:] for key in pairs} == expected


def test_many_runs_cost_no_more_than_their_pairs():
    seeds = ", ".join(map(str, range(1000)))
    s = sweep(f'[base]\ntask.name = "text"\nmethod.name = "lora"\nmethod.rank = [1, 2]\nseed = [{seeds}]')
    assert len(list(find_pairs(s, {spec.id for spec in s.runs}, ("method.rank",)))) == 1000
