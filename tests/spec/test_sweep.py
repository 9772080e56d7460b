"""Sweep files: what a grid expands to, and what is said about a file that is wrong."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.spec.claim import matches
from lorabench.spec.run_spec import RunSpec, canonical_json, flatten, spec_id, swept_keys, unflatten
from lorabench.spec.sweep import Sweep, parse_sweep, read_sweep
from tests.conftest import BASE as TOY

BASE = f'{TOY}method.name = "lora"\n'


def parse(text: str) -> Sweep:
    return parse_sweep(tomllib.loads(text), text)


def cells(text: str, *keys: str) -> list[tuple[object, ...]]:
    """The values of `keys` in each run, in order."""
    return [tuple(flatten(run.to_json()).get(key) for key in keys) for run in parse(BASE + text).runs]


def problems(text: str) -> list[str]:
    with pytest.raises(InputError) as error:
        parse(text)
    return error.value.problems


def test_without_axes_there_is_one_run() -> None:
    (run,) = parse(BASE).runs
    assert (run.method.name, run.task.name, run.lr) == ("lora", "text", 1e-3)


def test_lists_are_axes_the_last_fastest() -> None:
    assert cells("[[grid]]\nmethod.rank = [1, 4]\nlr = [1e-3, 3e-3]\n", "method.rank", "lr") == [
        (1, 1e-3), (1, 3e-3), (4, 1e-3), (4, 3e-3),
    ]  # fmt: skip


def test_blocks_are_concatenated_and_override_the_base() -> None:
    text = """
lr = [1e-3, 2e-3]
[[grid]]
lr = 5e-4
[[grid]]
task.max_train = [10, 20]
"""
    assert cells(text, "lr", "task.max_train", "task.name") == [
        (5e-4, None, "text"), (1e-3, 10, "text"), (2e-3, 10, "text"), (1e-3, 20, "text"), (2e-3, 20, "text"),
    ]  # fmt: skip


def test_a_block_with_another_method_drops_the_fields_of_the_bases() -> None:
    text = 'method.rank = [1, 2]\n[[grid]]\nmethod.name = "full"\n[[grid]]\nmethod.alpha = 4\n'
    assert cells(text, "method.name", "method.rank", "method.alpha") == [
        ("full", None, None), ("lora", 1, 4.0), ("lora", 2, 4.0),
    ]  # fmt: skip


def test_zip_moves_keys_together() -> None:
    text = """
[[grid]]
zip = ["method.rank", "method.alpha"]
method.rank = [1, 4]
method.alpha = [2, 8]
seed = [0, 1]
"""
    found = cells(text, "method.rank", "method.alpha", "seed")
    assert sorted(found) == [(1, 2.0, 0), (1, 2.0, 1), (4, 8.0, 0), (4, 8.0, 1)]
    assert parse(BASE + text).zips == (("method.rank", "method.alpha"),)


def test_two_zip_groups_are_two_axes() -> None:
    text = """
[[grid]]
zip = [["method.rank", "lr"], ["steps", "seed"]]
method.rank = [1, 2]
lr = [0.1, 0.2]
steps = [3, 4]
seed = [5, 6]
"""
    assert len(cells(text)) == 4
    assert set(cells(text, "steps", "seed")) == {(3, 5), (4, 6)}


def test_exclude_drops_cells_by_any_of_the_values() -> None:
    text = """
[[grid]]
method.rank = [1, 2, 4]
quantization = ["none", "nf4"]
exclude = [{method.rank = [1, 2], quantization = "nf4"}]
"""
    assert cells(text, "method.rank", "quantization") == [(1, "none"), (2, "none"), (4, "none"), (4, "nf4")]


def test_a_global_exclude_works_on_every_block_and_may_drop_what_is_no_valid_run() -> None:
    table = tomllib.loads(BASE + '[[grid]]\nmethod.name = ["lora", "full"]\nquantization = ["none", "nf4"]\n')
    with pytest.raises(InputError, match="cannot be trained"):
        parse_sweep(table)
    table["exclude"] = [{"method": {"name": "full"}, "quantization": "nf4"}]
    assert [run.quantization for run in parse_sweep(table).runs] == ["none", "nf4", "none"]


def test_equal_cells_are_one_run() -> None:
    assert len(parse(BASE + "[[grid]]\nlr = [1, 1.0]\n[[grid]]\nlr = 1\n").runs) == 1


def test_an_alias_of_the_default_is_the_same_run() -> None:
    assert parse(BASE).runs == parse(BASE + "seed = 0\nwarmup = 0.05\n").runs


ONE_PROBLEM = {
    "[grids]\n": "grids = {}: unknown section 'grids'. Did you mean 'grid'? Choices: name, base, grid",
    'name = "runs"\n': 'name = "runs": must be a file name',
    'name = "a/b"\n': 'name = "a/b": must be a file name',
    "grid = 3\n": "grid: must be written [[grid]]",
    BASE + "steps = []\n": "steps = []: an axis needs at least one value",
    BASE + "stepz = 3\n": "stepz = 3: unknown key 'stepz'. Did you mean 'steps'? Choices: method, task, tasks, model",
    BASE + "steps = 0\n": "steps = 0: must be at least 1",
    BASE + 'lr = "1e-4"\n': 'lr = "1e-4": must be a valid number',
    BASE + "lr = inf\n": "lr = inf: must be finite",
    BASE + 'keep = "svd"\n': 'keep = "svd": must be "updates", "none" or "svd:K"',
    BASE + 'quantization = "nf5"\n': (
        "quantization = \"nf5\": unknown value 'nf5'. Did you mean 'nf4'? Choices: none, int8, nf4"
    ),
    BASE + "method.rnk = 3\n": "method.rnk = 3: unknown key 'rnk'. Did you mean 'rank'?",
    BASE + "method.rank = 0\n": "method.rank = 0: must be at least 1",
    BASE + "micro_batch_size = 3\n": "micro_batch_size = 3: must divide batch_size = 8",
    TOY + 'method.name = "lorra"\n': (
        "method.name = \"lorra\": unknown method 'lorra'. Did you mean 'lora'? Choices: adalora, adapter"
    ),
    TOY + 'method = "lora"\n': "method.name: is missing. Choices: adalora, adapter",
    TOY: "method: is missing",
    BASE + '[[grid]]\nzip = ["lr", "steps"]\nlr = [1, 2]\n': (
        'zip = ["lr", "steps"]: each of these keys must be a list in this grid'
    ),
    BASE + '[[grid]]\nzip = ["lr", "steps"]\nlr = [1, 2]\nsteps = [1, 2, 3]\n': (
        'zip = ["lr", "steps"]: the lists must be of one length, but lr has 2, steps has 3'
    ),
    BASE + '[[grid]]\nzip = ["lr"]\nlr = [1, 2]\n': 'zip = ["lr"]: must be a list of keys',
    BASE + "[[grid]]\nzip = 3\n": "zip = 3: must be a list of keys",
    BASE + "[[grid]]\nexclude = {lr = 1}\n": 'exclude = {"lr": 1}: must be a list of tables',
    BASE + "[[grid]]\nexclude = [{seed = 0}]\nseed = 0\n": "exclude: leaves no run",
    BASE + "[[grid]]\nexclude = [{method.rnk = 1}]\n": "grid: exclude = \"method.rnk\": unknown key 'method.rnk'",
    BASE + '[select]\nover = "rl"\n': "select.over = \"rl\": unknown key 'rl'. Choices: method.name",
    BASE + '[select]\nby = "valid_los"\n': (
        "select.by = \"valid_los\": unknown measure 'valid_los'. Did you mean 'valid_loss'?"
    ),
    BASE + '[select]\nat = "lr"\n': "select.at = \"lr\": unknown key 'at'",
    BASE + '[[table]]\nrows = ["method.name"]\nvalue = "vl"\n': "table 1: value = \"vl\": unknown measure 'vl'",
    BASE + '[[table]]\nrows = ["rank"]\nvalue = "valid_loss"\n': "table 1: rows = \"rank\": unknown key 'rank'",
    BASE + '[[table]]\nrows = ["lr"]\nvalue = "valid_loss"\ncolumns = "c"\n': (
        "table 1: columns = \"c\": unknown key 'c'"
    ),
    BASE + "[[table]]\nrows = []\n": "table 1: value: is missing",
    BASE + '[[figure]]\nname = "grid"\n': "figure 1: figure.name = \"grid\": unknown figure 'grid'",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ONE_PROBLEM.items())
def test_a_problem_is_one_line_with_key_value_and_choices(text: str, message: str) -> None:
    found = problems(text if "[base]" in text else text + BASE)
    assert len(found) == 1 and found[0].startswith(message), found


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    text = """
nmae = "x"
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
steps = 0
[[grid]]
method.name = "lora"
method.rank = [0, 1]
[[grid]]
method.name = "full"
quantization = "nf5"
[select]
by = "loss"
"""
    starts = [line.split(" = ")[0] for line in problems(text)]
    assert starts[0] == "nmae"
    assert {"grid 1: method.rank", "steps", "grid 2: quantization"} <= set(starts)
    assert len(starts) == len(set(problems(text)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (None, "no such sweep file"),
        (b"base.lr = " + b"[" * 5000 + b"]" * 5000, "not valid TOML: nested too deep"),
        (b"base.seed = " + b"9" * 5000, "not valid TOML: "),
        (b"[base]\nlr = inf\nmethod.alpha = [1.0, 2.0]", "base.lr = inf: must be a finite number"),
        (b"[base]\nlr = 1" + b"0" * 400, r"base\.lr = 1000*…?\S*: must be a whole number of at most 64 bits"),
        (
            b"[base]\nmethod.rank = 9223372036854775808",
            "base.method.rank = 9223372036854775808: must be a whole number of",
        ),
    ],
)
def test_a_file_that_is_no_sweep_is_one_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "s.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rf"s\.toml: {message}"):
        read_sweep(file)


def test_a_sweep_is_named_by_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "ranks.toml").write_text(BASE)
    assert read_sweep(tmp_path / "ranks.toml").name == "ranks"
    assert read_sweep(tmp_path / "ranks.toml", "other").name == "other"
    (tmp_path / "ranks.toml").write_text('name = "mine"\n' + BASE)
    assert read_sweep(tmp_path / "ranks.toml", "other").name == "mine"


def test_axes_are_the_keys_in_which_runs_differ() -> None:
    other = '[[grid]]\nmethod.name = "full"\nlr = 1\nsteps = 5\n'
    sweep = parse(BASE + "[[grid]]\nlr = [1, 2]\nsteps = 5\nseed = [0, 1]\n" + other)
    assert {"lr", "seed", "method.name"} <= set(sweep.axes) and "steps" not in sweep.axes
    assert swept_keys([flatten(run.to_json()) for run in sweep.runs]) == ["lr", "seed"]


def test_a_key_that_like_runs_lack_tells_them_apart() -> None:
    block = "[[grid]]\n"
    for field, key in [('layers = "0"', "layers"), ("rank_pattern = {q_proj = 2}", "rank_pattern.q_proj")]:
        other = '[[grid]]\nmethod.name = "full"\n'  # has no such key either, and is told apart by its name
        sweep = parse(f"{BASE}{block}seed = [0, 1]\n{block}seed = [0, 1]\nmethod.{field}\n{other}")
        assert {*swept_keys([run.flat for run in sweep.runs])} == {f"method.{key}", "seed"}


def test_the_name_of_a_bridge_stands_with_its_type() -> None:
    sweep = parse(f'{BASE}[[grid]]\noptimizer = ["adamw", {{name = "torch", type = "Adagrad"}}]\n')
    assert swept_keys([run.flat for run in sweep.runs]) == ["optimizer.name", "optimizer.type"]


# ---------------------------------------------------------------- specs and their ids

SPECS = st.fixed_dictionaries(
    {
        "method": st.one_of(
            st.fixed_dictionaries({"name": st.just("full")}),
            st.fixed_dictionaries(
                {"name": st.just("lora")},
                optional={"rank": st.integers(1, 64), "alpha": st.one_of(st.floats(0.1, 64), st.just("2r"))},
            ),
        ),
        "task": st.fixed_dictionaries({"name": st.just("text")}, optional={"max_train": st.integers(1, 9)}),
    },
    optional={
        "lr": st.floats(1e-6, 1.0),
        "steps": st.integers(1, 9),
        "seed": st.integers(0, 9),
        "clip": st.one_of(st.just("none"), st.floats(0.1, 9)),
        "keep": st.sampled_from(["updates", "none", "svd:8"]),
        "model": st.text(min_size=1, max_size=5),
    },
)


@given(SPECS)
def test_a_spec_goes_through_json_and_back(table: dict) -> None:
    spec = RunSpec.from_json(table)
    text = json.dumps(spec.to_json())
    again = RunSpec.from_json(json.loads(text))
    assert again == spec and again.id == spec.id == spec_id(json.loads(text))


@given(SPECS, st.randoms())
def test_the_id_depends_on_content_alone(table: dict, random: object) -> None:
    spec = RunSpec.from_json(table)

    def shuffled(value: object) -> object:
        if not isinstance(value, dict):
            return int(value) if isinstance(value, float) and value.is_integer() else value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert spec_id(shuffled(spec.to_json())) == spec.id
    assert RunSpec.from_json(shuffled(spec.to_json())).id == spec.id


def test_every_field_changes_the_id() -> None:
    spec = parse(BASE).runs[0]
    other = {
        "model": "x", "revision": "r", "quantization": "nf4", "dtype": "bfloat16", "seq_len": 64, "batch_size": 4,
        "micro_batch_size": 2, "steps": 7, "lr": 0.5, "schedule": "cosine", "warmup": 0.5, "weight_decay": 0.5,
        "beta1": 0.5, "beta2": 0.5, "epsilon": 0.5, "clip": "none", "gradient_checkpointing": True, "eval_every": 5,
        "keep": "none", "threads": 2, "seed": 9, "method": {"name": "full"}, "task": {"name": "text", "max_eval": 3},
        "serving": False,
    }  # fmt: skip
    assert set(other) == set(spec.to_json())
    ids = {RunSpec.from_json(spec.to_json() | {key: value}).id for key, value in other.items()} | {spec.id}
    assert len(ids) == len(other) + 1


def test_canonical_json_has_one_form_for_equal_content() -> None:
    import hashlib

    table = {"b": {"y": 1.0, "x": -0.5}, "a": [1e-4, True, None, "é"], "method": {"name": "m"}}
    text = b'{"a":[0.0001,true,null,"\\u00e9"],"b":{"x":-0.5,"y":1},"method":{"name":"m"}}'
    assert canonical_json(table) == text
    assert spec_id(table) == f"m-{hashlib.sha256(text).hexdigest()[:12]}"


def test_flatten_and_unflatten_are_inverses() -> None:
    table = {"a": {"b": {"c": 1}, "d": [1]}, "e": None}
    assert flatten(table) == {"a.b.c": 1, "a.d": [1], "e": None}
    assert unflatten(flatten(table)) == table


SHIPPED = sorted(Path(__file__).parents[2].glob("sweeps/**/*.toml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_sweep_expands_and_its_header_says_why(file: Path) -> None:
    sweep = read_sweep(file)
    assert len({run.id for run in sweep.runs}) == len(sweep.runs) > 0
    for run in sweep.runs:
        assert RunSpec.from_json(json.loads(json.dumps(run.to_json()))) == run
    for word in ("# Question:", "# Cost:", "# Expect:"):
        assert word in sweep.text


def test_what_is_wrong_in_the_base_is_said_once() -> None:
    text = 'steps = 0\n[[grid]]\nmethod.name = "full"\n[[grid]]\nmethod.name = "lora"\nmethod.rank = 0\n'
    with pytest.raises(InputError) as error:
        cells(text, "lr")
    assert error.value.problems == ["steps = 0: must be at least 1", "grid 2: method.rank = 0: must be at least 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[select]\nby = "valid_accuracy"\n', ["select.by", "valid_accuracy", "valid_loss"]),
        ('[select]\nby = "test_accuracy"\n', ["select.by", "on the test set", "valid_accuracy"]),
        ('[select]\nby = "test_loss"\n', ["select.by", "on the test set", "valid_loss"]),
        ('[select]\nby = "test_code_token_accuracy"\n', ["select.by", "on the test set", '"valid_token_accuracy"']),
        ('[select]\nover = "seed"\n', ["select.over", "seed", "lr"]),
        ('[[table]]\nrows = []\nvalue = "valid_loss"\n', ["rows = []"]),
        ('[[table]]\nrows = ["lr"]\ncolumns = "lr"\nvalue = "valid_loss"\n', ["columns", "among rows"]),
        ('[[table]]\nrows = ["lr"]\nvalue = "valid_loss"\nname = "../up"\n', ["name", "../up", "file name"]),
        ('[[figure]]\nname = "rank_quality"\nvalue = "valid_acuracy"\n', ["figure 1", "valid_acuracy"]),
        ('[[figure]]\nname = "cost_quality"\ncosts = ["peak_gb"]\n', ["peak_gb", "peak_gib"]),
        ('[[grid]]\nzip = [["lr", "seed"], ["seed", "steps"]]\nlr = [1, 2]\nseed = [0, 1]\nsteps = [1, 2]\n', ["seed"]),
    ],
)  # fmt: skip
def test_what_would_go_wrong_later_is_said_when_the_sweep_is_read(text: str, words: list[str]) -> None:
    (problem,) = problems(BASE + text)
    assert all(word in problem for word in words), problem


def test_no_test_measure_is_among_the_choices() -> None:
    (problem,) = problems(BASE + '[select]\nby = "tset_loss"\n')
    assert "valid_loss" in problem and "test_" not in problem


CLAIM = BASE + 'method.rank = [4, 8]\n[[claim]]\nsays = "so it is"\nmeasure = "valid_loss"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "claim 1: at_most: is missing: a claim needs at_least, at_most or both"),
        ("at_most = 1\nat_least = 2\n", "claim 1: at_least = 2: is above at_most = 1"),
        ("at_most = 1\nminus = {}\nratio_to = {}\n", "claim 1: minus = {}: not beside ratio_to"),
        (
            "at_most = 1\nwhere = { method.rnk = 4 }\n",
            "claim 1: where = \"method.rnk\": unknown key 'method.rnk'. Did you",
        ),
        ("at_most = 1\nwhere = { method.rank = 5 }\n", 'claim 1: where = {"method": {"rank": 5}}: is no run of this'),
        ('at_most = 1\nminus = { measure = "los" }\n', 'claim 1: minus.measure = "los": unknown measure'),
        ('at_most = 1\ncounted_on = "gpt"\n', 'claim 1: counted_on = "gpt": unknown value'),
        ('at_most = 1\ncounted_on = "bert-base"\n', 'claim 1: measure = "valid_loss": is nothing that can be counted'),
        ("at_most = -1\nwhere = { method.rank = 4 }\nratio_to = {}\n", "claim 1: at_most = -1: a ratio is of positive"),
        (
            'at_most = 1\nwhere = { method.rank = 4 }\nminus = { measure = "peak_gib" }\n',
            'claim 1: measure = "valid_loss": cannot be held against the other side\'s: valid_loss in nats and ',
        ),
        ("at_most = 1\nwhere = {}\nratio_to = {}\n", "claim 1: where = {}: are the runs that these are held against"),
        ("at_most = 1\nbound = 1\n", "claim 1: bound = 1: unknown key 'bound'"),
        ('at_most = 1\n[[claim]]\nsays = ""\nmeasure = "x"\nat_most = 1\n', 'claim 2: says = "": needs the claim\'s'),
        ('at_most = 1\n[[claim]]\nsays = "a"\nmeasure = "x"\nat_most = 1\n', 'claim 2: measure = "x": unknown meas'),
    ],
)
def test_a_claim_that_could_never_be_decided_is_refused(text: str, problem: str) -> None:
    (found,) = problems(CLAIM + text)
    assert found.startswith(problem)


def test_a_claim_names_runs_by_a_value_or_several() -> None:
    (claim,) = parse_sweep(tomllib.loads(CLAIM + "at_most = 2.5\nwhere = { method.rank = [4, 9] }\n")).claims
    assert claim.bound == "≤ 2.5"
    assert [matches({"method.rank": rank}, claim.sides["where"]) for rank in (4, 8, 9, None)] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("by", ["test_loss", "base_valid_loss"])
def test_a_stored_sweep_may_select_as_it_was_allowed_to(by: str) -> None:
    """So that what was run before is analyzed as it was."""
    text = BASE + f'[select]\nby = "{by}"\n'
    assert len(problems(text)) == 1
    select = parse_sweep(tomllib.loads(text), stored=True).select
    assert select is not None and select.by == by


MODEL, DATA = 'model = "builtin:tiny-llama"\n', 'task.data = "builtin:python-code"\n'
NO_MODEL = (
    "model: is missing: a Hub id, a local folder, builtin:tiny-diffusion, builtin:tiny-llama, "
    "builtin:tiny-llama-arithmetic, builtin:tiny-t5 or builtin:tiny-vit"
)
NO_DATA = (
    "task.data: is missing: a file, a folder, a Hub data set, builtin:arithmetic, builtin:digits, "
    "builtin:digits-16, builtin:digits-outlined, builtin:digits-turned, builtin:english-docs, "
    "builtin:python-code or builtin:questions"
)
TEXT, TWO = 'task.name = "text"\n', 'tasks = [{name = "text", data = "x"}, {name = "text"}]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, [NO_MODEL, NO_DATA]),
        (TEXT + "lr = [1, 2]\n", [NO_MODEL, NO_DATA]),
        (TEXT + "[[grid]]\nlr = [1, 2]\n[[grid]]\nlr = 3\n", [NO_MODEL, NO_DATA]),
        (MODEL + TEXT, [NO_DATA]),
        (TEXT + DATA, [NO_MODEL]),
        (MODEL + TWO, [f"tasks 2: {NO_DATA}"]),
        (MODEL + DATA, [f"task.name: is missing. Choices: {', '.join(plugins.names('tasks'))}"]),
        (TEXT + DATA + f"[[grid]]\n{MODEL}[[grid]]\nlr = [1, 2]\n", [f"grid 2: {NO_MODEL}"]),
        (MODEL + TEXT + DATA + '[[grid]]\nlr = 1\n[[grid]]\ntask.name = "completion"\n', [f"grid 2: {NO_DATA}"]),
        (MODEL + TEXT + f"[[grid]]\nlr = 1\n[[grid]]\n{DATA}lr = [2, 3]\n", [f"grid 1: {NO_DATA}"]),
        (TEXT + "steps = 0\n", [NO_MODEL, NO_DATA, "steps = 0: must be at least 1"]),
    ],
)
def test_a_model_and_data_that_are_not_named_are_asked_for(text: str, expected: list[str]) -> None:
    assert problems(f'[base]\nmethod.name = "lora"\n{text}') == expected


def test_each_block_may_name_its_own() -> None:
    blocks = f"[[grid]]\n{MODEL}{DATA}[[grid]]\nmodel = 'a'\ntask.data = ['b', 'c']\n"
    runs = parse(f'[base]\nmethod.name = "lora"\n{TEXT}{blocks}').runs
    names = [(run.model, run.task.data) for run in runs]
    assert names == [("builtin:tiny-llama", "builtin:python-code"), ("a", "b"), ("a", "c")]


def test_a_spec_of_old_without_them_means_what_it_meant_and_naming_them_changes_no_id() -> None:
    old = {"method": {"name": "lora"}, "task": {"name": "text"}}
    (run,) = parse(BASE).runs
    assert run.id == RunSpec.from_json(old).id == "lora-f1a84b758b94"  # as commit 947c60c has it
    assert parse_sweep({"base": old}, stored=True).runs == (run,)
    docs = {"name": "text", "data": "builtin:english-docs"}
    unnamed = {"method": {"name": "lora"}, "tasks": [{"name": "text"}, docs]}
    named = unnamed | {"model": run.model, "tasks": [{"name": "text", "data": run.task.data}, docs]}
    assert parse_sweep({"base": named}).runs[0].id == RunSpec.from_json(unnamed).id


LABELLED = """
[[grid]]
label = "LoRA, rank {method.rank}"
method.name = "lora"
method.rank = [1, 2]
[[grid]]
label = "full"
method.name = "full"
"""


def test_settings_can_be_named():
    base = f"{TOY}seed = [0, 1]\n"
    sweep = parse(base + LABELLED)
    assert [sweep.labels[run.id] for run in sweep.runs] == ["LoRA, rank 1", "LoRA, rank 2"] * 2 + ["full"] * 2
    bare = parse(base + re.sub("label.*", "", LABELLED))
    assert [run.id for run in bare.runs] == [run.id for run in sweep.runs]  # a name changes no run


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('label = "full"', "", "label: is missing in some"),
        ("{method.rank}", "{method.rnk}", "Did you mean 'method.rank'?"),
        ('label = "full"', "label = 3", "label = 3: must be a text"),
        ("LoRA, rank {method.rank}", "LoRA", 'label = "LoRA": is given to runs that differ in method.rank'),
    ],
)
def test_a_wrong_label_is_an_error(old, new, problem):
    with pytest.raises(InputError) as error:
        parse(TOY + LABELLED.replace(old, new))
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("base", "measure", "says"),
    [
        ("", "forgetting", "give task.retain"),
        ("", "retain_loss_after", "give task.retain"),
        ("serving = false\n", "merge_error", "all of them have serving = false"),
    ],
)
def test_a_measure_that_these_runs_lack_says_what_would_give_it(base: str, measure: str, says: str) -> None:
    (found,) = problems(BASE + base + f'[[table]]\nrows = ["method.name"]\nvalue = "{measure}"\n')
    assert found.startswith(f'table 1: value = "{measure}": is measured by no run of this sweep: ') and says in found
