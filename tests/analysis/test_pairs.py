import tomllib

from lorabench.analysis import pairs as module
from lorabench.analysis.pairs import PAIR_AXES, find_pairs
from lorabench.spec.run_spec import flatten
from lorabench.spec.sweep import parse_sweep
from tests.conftest import BASE

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
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
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
    model = "builtin:tiny-llama"
    task.name = "text"
    task.data = "builtin:python-code"
    [[grid]]
    method.name = "lora"
    method.rank = [2, 8]
    method.alpha = [4, 16]
    """
    crossed, zipped = sweep(text), sweep(text + 'zip = ["method.rank", "method.alpha"]\n')
    for s, expected in ((crossed, {((2, 4), (8, 4)), ((2, 16), (8, 16))}), (zipped, {((2, 4), (8, 16))})):
        pairs = named(s, find_pairs(s, {spec.id for spec in s.runs}, AXES), "method.rank", "method.alpha")
        assert {key[1:] for key in pairs} == expected


def seeds(count, ranks="[1, 2]"):
    numbers = ", ".join(map(str, range(count)))
    return sweep(f'{BASE}method.name = "lora"\nmethod.rank = {ranks}\nseed = [{numbers}]')


def test_of_many_pairs_that_say_the_same_a_sample_is_compared():
    s = seeds(200)
    ids = [spec.id for spec in s.runs]
    flats = {spec.id: flatten(spec.to_json()) for spec in s.runs}
    pairs = list(find_pairs(s, ids, AXES))
    of_ranks, of_seeds = ([pair for pair in pairs if pair.axis == axis] for axis in AXES)
    assert len(of_ranks) == module.MAX_PAIRS and len(of_seeds) == 2 * module.MAX_PAIRS
    assert all(flats[pair.run_a]["seed"] == flats[pair.run_b]["seed"] for pair in of_ranks)
    assert {flats[pair.run_a]["method.rank"] for pair in of_seeds} == {1, 2}
    assert sorted(pair.order for pair in of_seeds) == [*range(2 * module.MAX_PAIRS)]
    for first in range(0, 2 * module.MAX_PAIRS, 2):  # each further pair of every setting in its turn
        both = [pair for pair in of_seeds if first <= pair.order < first + 2]
        assert {flats[pair.run_a]["method.rank"] for pair in both} == {1, 2}
    assert list(find_pairs(s, ids[::-1], AXES)) == pairs


def test_another_run_changes_few_of_a_sample_and_none_of_a_whole():
    few, more, many = seeds(4, "1"), seeds(300, "1"), seeds(301, "1")
    found = [{(p.run_a, p.run_b) for p in find_pairs(s, [r.id for r in s.runs], AXES)} for s in (few, more, many)]
    assert len(found[0]) == 6 and len(found[1]) == len(found[2]) == module.MAX_PAIRS
    assert len(found[1] & found[2]) >= module.MAX_PAIRS - 8


METHODS = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
seed = [0, 1]
[[grid]]
method.name = "lora"
method.rank = [2, 4]
method.dora = [false, true]
lr = [1e-3, 3e-3]
[[grid]]
method.name = "full"
lr = [1e-4, 1e-3]
[select]
over = "lr"
"""


def test_methods_are_compared_at_one_rank_each_at_its_selected_lr():
    s = sweep(METHODS)
    flats = {spec.id: flatten(spec.to_json()) for spec in s.runs}
    best = {"lora": 3e-3, "full": 1e-4}
    chosen = [run for run, flat in flats.items() if flat["lr"] == best[flat["method.name"]]]
    pairs = [p for p in find_pairs(s, flats, PAIR_AXES, chosen) if p.axis == "method"]
    values = [(p.value_a, p.value_b) for p in pairs]
    assert values.count(("full", "lora")) == 2 * 4
    assert values.count(("lora (dora False)", "lora (dora True)")) == 2 * 2 and len(pairs) == 12
    for pair in pairs:
        a, b = flats[pair.run_a], flats[pair.run_b]
        assert a["seed"] == b["seed"] and a.get("method.rank", b["method.rank"]) == b["method.rank"]
    assert "lr" not in {pair.axis for pair in find_pairs(s, flats, PAIR_AXES, chosen)}
    without = list(find_pairs(s, flats, PAIR_AXES))
    assert {(flats[p.run_a]["lr"], flats[p.run_b]["lr"]) for p in without if p.axis == "lr"} == {
        (1e-3, 3e-3),
        (1e-4, 1e-3),
    }
    assert all(flats[p.run_a]["lr"] == flats[p.run_b]["lr"] for p in without if p.axis == "method")


def test_labels_are_what_methods_are_called():
    text = METHODS.replace("method.dora = [false, true]", 'label = "LoRA {method.rank}"')
    text = text.replace('method.name = "full"', 'method.name = "full"\nlabel = "all weights"')
    s = sweep(text)
    ids = [spec.id for spec in s.runs]
    found = {(p.value_a, p.value_b) for p in find_pairs(s, ids, PAIR_AXES, ids) if p.axis == "method"}
    assert found == {("all weights", "LoRA 2"), ("all weights", "LoRA 4")}


def test_tasks_and_quantization():
    text = """
    [base]
    model = "builtin:tiny-llama"
    method.name = "lora"
    quantization = ["none", "nf4"]
    [[grid]]
    task.name = "text"
    task.data = "builtin:python-code"
    [[grid]]
    task.name = "text"
    task.data = "builtin:english-docs"
    [[grid]]
    tasks = [{ name = "text", data = "builtin:python-code" }, { name = "text", data = "builtin:english-docs" }]
    """
    s = sweep(text)
    pairs = list(find_pairs(s, [spec.id for spec in s.runs], PAIR_AXES))
    values = {axis: {(p.value_a, p.value_b) for p in pairs if p.axis == axis} for axis in ("task", "quantization")}
    assert values["quantization"] == {("nf4", "none")}
    names = {"python-code", "english-docs", "python-code > english-docs"}
    assert {frozenset(pair) for pair in values["task"]} == {frozenset(names - {name}) for name in names}
    assert len(pairs) == 2 * 3 + 3


def test_runs_that_differ_in_two_zipped_axes_are_one_pair():
    text = f'{BASE}method.name = "lora"\n[[grid]]\nmethod.rank = [2, 4]\nlr = [1e-3, 2e-3]\n'
    s = sweep(text + 'zip = ["method.rank", "lr"]\n')
    (pair,) = find_pairs(s, [spec.id for spec in s.runs], PAIR_AXES)
    assert (pair.axis, pair.value_a, pair.value_b) == ("method.rank", 2, 4)


def test_methods_are_compared_each_at_its_only_learning_rate():
    text = """
    [base]
    model = "builtin:tiny-llama"
    task.name = "text"
    task.data = "builtin:python-code"
    seed = [0, 1]
    [[grid]]
    method.name = "lora"
    lr = {rates}
    [[grid]]
    method.name = "full"
    lr = 2e-4
    """
    for rates, expected in (("2e-3", {(2e-3, 2e-4)}), ("[2e-3, 1e-2]", set())):
        s = sweep(text.replace("{rates}", rates))
        pairs = named(s, find_pairs(s, {spec.id for spec in s.runs}, ("method",)), "method.name", "lr", "seed")
        assert {tuple(run[1] for run in sorted(key[1:], reverse=True)) for key in pairs} == expected
        assert all(a[2] == b[2] for _, a, b in pairs)
