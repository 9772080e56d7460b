"""Scaled intruders: against dense numpy SVDs, a hand-made intruder, the runs' own records, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabench.adapters.intervention import intervene as engine
from lorabench.adapters.intervention import path
from lorabench.adapters.intervention.directions import CONTROL, INTRUDERS, KINDS, RANDOM, find_directions, nearest
from lorabench.adapters.intervention.intervene import BASE, TUNED, Bench, Intervention, intervene, read_run, scaled
from lorabench.adapters.intervention.intervene_report import by_setting, correlation, intervention_text, make_rows
from lorabench.adapters.kept import kept_parts
from lorabench.analysis.bases import FOLDER, Bases
from lorabench.cli import main
from lorabench.config.digests import file_digests
from lorabench.config.toml_text import as_toml
from lorabench.report.aggregate import interval
from lorabench.store.interventions import read_interventions
from lorabench.store.paths import read_paths
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from lorabench.updates.formats import read_updates
from lorabench.updates.update import INITIAL_FILE, Update, save_updates
from tests.conftest import make_spec
from tests.training.test_sequence import CODE, DOCS, make_sequence, write_labelled

QUIET = Options(log_to_file=False, device="cpu")
CPU = torch.device("cpu")
RETAINED = CODE | {"retain": "builtin:english-docs"}
LORA = {"name": "lora", "rank": 2}
ONE = Intervention(lambdas=(1.0,))


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    """The store, and in it runs by what they are."""
    folder = tmp_path_factory.mktemp("intervene")
    store, films = Store(folder / "results"), write_labelled(folder / "films", ["bad", "good"])
    specs = {
        "lora": make_spec(method=LORA, task=RETAINED, lr=5e-2),
        "full": make_spec(method={"name": "full"}, task=RETAINED, lr=5e-3),
        "gpt2": make_spec(method=LORA, task=RETAINED, model=tiny_bases["gpt2"]),
        "pissa": make_spec(method=LORA | {"init": "pissa"}, task=RETAINED),
        "nf4": make_spec(method=LORA, task=RETAINED, quantization="nf4", lr=5e-2),
        "bfloat16": make_spec(method=LORA, task=RETAINED, dtype="bfloat16", lr=5e-2),
        "films": make_spec(method=LORA, task=films, model=tiny_bases["bert"], quantization="nf4", steps=12),
        "sequence": make_sequence(RETAINED, DOCS, method=LORA, steps=3),
    }
    for spec in specs.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store, {name: spec.id for name, spec in specs.items()}


def pretend(store, spec, updates=(), file=None):
    """A run that was never trained, as if it had learned `updates`; its id."""
    folder = store.folder(spec.id) / "updates"
    folder.mkdir(parents=True)
    if updates:
        save_updates(updates, folder)
    if file is not None:
        (folder / file).touch()
    store.write_spec(spec)
    files, measures = file_digests(folder, folder.parent), {"valid_loss": 3.0}
    store.write(
        RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, files=files, measures=measures)
    )  # fmt: skip
    return spec.id


def random_update(seed, size):
    """ΔW of rank 1 and that norm, of the built-in model's first attention output matrix."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0) for _ in range(2))
    return Update(parameter="model.layers.0.self_attn.o_proj.weight", B=size * u[:, None], A=v[None])


def run_of(runs, name):
    store, ids = runs
    return read_run(store, ids[name])


def directions(runs, name, epsilon=0.5, top=10):
    run = run_of(runs, name)
    return find_directions(run.record, run.folder, Bases(runs[0].root / FOLDER, print), epsilon, top)


def record_of(runs, name, wanted=ONE):
    return intervene(runs[0], run_of(runs, name), wanted, "cpu", lambda _: None)


def point(record, scaled, scale):
    return next(p for p in record["points"] if (p["scaled"], p["lambda"]) == (scaled, scale))


def matrix(model, parameter):
    """(out, in), float64."""
    from lorabench.models.weights import is_transposed

    weight = model.get_parameter(parameter).detach().double().numpy()
    return weight.T if is_transposed(model.get_submodule(parameter.removesuffix(".weight"))) else weight


@pytest.mark.parametrize("name", ["lora", "full", "gpt2", "nf4"])
def test_scaled_weights_are_those_of_dense_numpy(name, runs) -> None:
    found, epsilon, top, scale = directions(runs, name), 0.5, 10, 0.3
    bench = Bench(run_of(runs, name), found, CPU)
    originals = {each.parameter: matrix(bench.base, each.parameter).copy() for each in found}
    tuned = {each.parameter: matrix(bench.tuned, each.parameter).copy() for each in found}
    expected, num_intruders = {}, 0
    for parameter, W in tuned.items():
        X = np.linalg.svd(originals[parameter], full_matrices=False)[0]
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        chosen = [j for j in range(top) if np.abs(X.T @ U[:, j]).max() < epsilon]
        num_intruders += len(chosen)
        expected[parameter] = W + (scale - 1) * sum(S[j] * np.outer(U[:, j], Vh[j]) for j in chosen)
    assert num_intruders == sum(len(each.triplets[INTRUDERS].S) for each in found) > 0
    with scaled(bench.tuned, found, INTRUDERS, scale):
        for parameter, W in expected.items():
            np.testing.assert_allclose(matrix(bench.tuned, parameter), W, atol=1e-4 * np.linalg.norm(W, 2))
    for parameter, W in tuned.items():
        assert np.array_equal(matrix(bench.tuned, parameter), W)


def test_controls_are_other_triplets_of_the_same_matrix_and_as_many(runs) -> None:
    for each in directions(runs, "lora"):
        intruders, control, random = (each.triplets[kind] for kind in KINDS)
        assert len(control.S) == len(intruders.S) == len(random.S)
        assert (each.cosines[INTRUDERS] < 0.5).all() and (each.cosines[CONTROL] >= 0.5).all()
        if len(intruders.S):
            assert float((control.U.T @ intruders.U).abs().max()) < 1e-3
            assert torch.equal(random.S, intruders.S)
            for one, count in ((random.U, len(random.S)), (random.Vh.T, len(random.S)), (control.U, len(control.S))):
                torch.testing.assert_close(one.T @ one, torch.eye(count), atol=1e-5, rtol=0)


def test_where_there_are_fewer_others_all_of_them_are_controls() -> None:
    wanted, given = torch.tensor([5.0, 4.0, 3.0]), torch.tensor([9.0, 4.5])
    assert nearest(wanted, given).tolist() == [0, 1]
    assert nearest(wanted[:1], given).tolist() == [1] and nearest(wanted[:0], given).tolist() == []


def make_intruder(base_folder, folder, size):
    """A base, and ΔW = size · u vᵀ with u and v orthogonal to all that W0 maps: an exact triplet, of cosine 0."""
    name = "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(base_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    M, N = tensors[name].shape
    assert M > N  # so that W0's left vectors leave room for u
    U, S, Vh = torch.linalg.svd(tensors[name].double(), full_matrices=False)
    S[-1] = 0
    W0 = ((U * S) @ Vh).float()
    save_file(tensors | {name: W0}, folder / "model.safetensors", metadata={"format": "pt"})
    U, S, Vh = torch.linalg.svd(W0.double())
    return Update(parameter=name, B=(size * U[:, [N]]).float(), A=Vh[[-1]].float())


def test_without_a_hand_made_intruder_the_model_is_the_base(tiny_bases, tmp_path) -> None:
    update, store = make_intruder(tiny_bases["llama"], tmp_path / "base", 3.0), Store(tmp_path / "results")
    spec = make_spec(method={"name": "full"}, task=RETAINED, model=str(tmp_path / "base"))
    run = read_run(store, pretend(store, spec, [update]))
    found = intervene(store, run, Intervention(lambdas=(0, 0.5)), "cpu", lambda _: None)
    assert (found["num_intruders"], found["num_control"]) == (1, 1)
    (only,) = found["matrices"]
    assert only["singular_values"][INTRUDERS] == pytest.approx([3.0], rel=1e-5)
    assert only["largest_cosines"][INTRUDERS] == pytest.approx([0], abs=1e-3)
    base, without, tuned = point(found, BASE, None), point(found, INTRUDERS, 0), point(found, TUNED, 1)
    for key in ("valid_loss", "retain_loss"):
        assert without[key] == pytest.approx(base[key], rel=1e-6)
        assert abs(tuned[key] - base[key]) > 1e-4
    assert without["forgetting"] == pytest.approx(0, abs=1e-5)
    assert abs(point(found, CONTROL, 0)["valid_loss"] - base["valid_loss"]) > 1e-4


@pytest.mark.parametrize(
    ("name", "rel"),
    [
        ("lora", 1e-5), ("full", 1e-5), ("gpt2", 1e-5), ("pissa", 1e-5), ("nf4", 1e-4), ("bfloat16", 1e-2),
        ("films", 1e-4), ("sequence", 1e-5),
    ],
)  # fmt: skip
def test_at_one_it_is_the_run_itself(name, rel, runs) -> None:
    record, measures = record_of(runs, name), run_of(runs, name).record.measures
    tuned = point(record, TUNED, 1)
    assert tuned["valid_loss"] == pytest.approx(measures["valid_loss"], rel=rel)
    if name != "films":  # the untouched head of a classifier is random, and is made the same way or not at all
        assert point(record, BASE, None)["valid_loss"] == pytest.approx(measures["base_valid_loss"], rel=max(rel, 1e-4))
    else:
        assert tuned["valid_accuracy"] == measures["valid_accuracy"]
    if "retain_loss_after" in measures:
        assert tuned["retain_loss"] == pytest.approx(measures["retain_loss_after"], rel=rel)
        assert tuned["forgetting"] == pytest.approx(measures["forgetting"], abs=10 * rel)
    assert abs(measures["valid_loss"] - measures["base_valid_loss"]) > 10 * rel  # else it would show nothing


def test_the_record_says_what_was_evaluated(runs) -> None:
    assert "dequantized nf4" in record_of(runs, "nf4")["evaluated"]
    assert "loaded in bfloat16" in record_of(runs, "bfloat16")["evaluated"]
    record = record_of(runs, "lora")
    assert record["evaluated"].startswith("W0 (the original weights) with ΔW") and record["environment"]["packages"]
    assert record["spec"] == run_of(runs, "lora").spec.to_json()
    assert record["num_matrices"] == sum(1 for update in read_updates(run_of(runs, "lora").folder))


def test_what_is_there_is_read_and_what_is_not_is_added(runs, monkeypatch) -> None:
    store, _ = runs
    evaluated, wanted = [], Intervention(lambdas=(0.5,), top=5)
    evaluate = Bench.evaluate

    def counted(bench, at):
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        evaluated.append(at["scaled"])
        return evaluate(bench, at)

    monkeypatch.setattr(Bench, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        record_of(runs, "lora", wanted)
    evaluated[:] = ["again"] * 4
    first = record_of(runs, "lora", wanted)
    assert evaluated[4:] == [CONTROL, RANDOM]
    monkeypatch.setattr(engine, "Bench", None)
    monkeypatch.setattr(engine, "find_directions", None)
    assert record_of(runs, "lora", wanted) == first
    assert json.loads((store.root / "interventions" / first["intervention_id"] / "record.json").read_text()) == first
    record = run_of(runs, "lora").record
    read = read_interventions(store.root, {record.run_id: record})[record.run_id]
    assert [each for each in read if each["k"] == 5] == [{"epsilon": 0.5, "k": 5} | each for each in first["points"]]
    monkeypatch.undo()
    more = record_of(runs, "lora", Intervention(lambdas=(0.5, 2.0), top=5))
    assert more["points"][:5] == first["points"] and len(more["points"]) == 8


def test_the_command(tmp_path, capsys) -> None:
    store, figure = Store(tmp_path), tmp_path / "figures" / "scaled.png"
    full = {"method": {"name": "full"}, "task": RETAINED}
    ids = [pretend(store, make_spec(seed=seed, **full), [random_update(seed, 20.0)]) for seed in (0, 1, 2)]
    command = ["intervene", *ids, "--lambdas", "0,1", "--device", "cpu", "--results", str(tmp_path)]
    assert main([*command, "--figure", str(figure), "--html", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    heads, *lines = out.splitlines()[2:]
    assert heads.split("  ")[0] == "scaled" and "Δ forgetting (%)" in heads
    assert [line.split()[0] for line in lines[:5]] == [BASE, TUNED, *KINDS]
    assert "±" in lines[1] and "[1/5] base" in err
    assert lines[-1].endswith("with forgetting needs at least 5 settings, and has 1")
    assert figure.stat().st_size > 10_000 and figure.with_suffix(".pdf").exists() and "wrote" in err
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    at = {row["scaled"]: row for row in found["rows"]}
    values = [point(record, INTRUDERS, 0)["forgetting"] for record in found["interventions"]]
    tuned = [point(record, TUNED, 1)["forgetting"] for record in found["interventions"]]
    changes = [100 * (a - b) / b for a, b in zip(values, tuned, strict=True)]
    assert (at[INTRUDERS]["forgetting"]["mean"], at[INTRUDERS]["forgetting"]["half"]) == interval(values)
    assert min(tuned) > 0 and at[INTRUDERS]["forgetting_change"]["mean"] == pytest.approx(interval(changes)[0])
    assert at[INTRUDERS]["num_directions"] == at[CONTROL]["num_directions"] == 1
    (part,) = kept_parts(store, ids)
    page = (tmp_path / "page.html").read_text()
    assert part.tables[0].heads == re.split("  +", heads) and len(part.figures) == 1 and 'alt="interventions"' in page
    for line, row in zip(lines, part.tables[0].cells, strict=False):
        assert row == ["–" if text == "-" else text for text in re.split("  +", line)]
    assert kept_parts(store, ids[:1])[0].tables[0].cells != part.tables[0].cells
    (tmp_path / "interventions" / "damaged").mkdir()
    (tmp_path / "interventions" / "damaged" / "record.json").write_text("{")
    assert kept_parts(store, ids)[0].tables == part.tables and not kept_parts(store, ["others"])


def test_a_run_without_intruders_says_so(tmp_path, capsys) -> None:
    run_id = pretend(Store(tmp_path), make_spec(method={"name": "full"}, task=RETAINED), [random_update(0, 1e-3)])
    command = ["intervene", run_id, "--results", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--figure", str(tmp_path / "none.pdf")]) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 runs have no intruder among the top 10 of each matrix at ε = 0.5" in out
    assert "nothing to draw: no run has an intruder" in err and not (tmp_path / "none.pdf").exists()


LOFTQ = {"method": LORA | {"init": "loftq"}, "quantization": "nf4"}


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        ({"method": {"name": "prompt"}}, None, "method prompt computes what no ΔW stands for"),
        ({"keep": "none"}, None, 'has not kept its ΔW as a whole (keep = "none")'),
        ({"keep": "svd:1"}, None, 'has not kept its ΔW as a whole (keep = "svd:1")'),
        (LOFTQ, INITIAL_FILE, "is LoftQ"),
    ],
)
def test_what_is_not_base_plus_update_is_refused(changes, file, message, tmp_path, capsys) -> None:
    run_id = pretend(Store(tmp_path), make_spec(**changes), file=file)
    assert main(["intervene", run_id, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("field", ["trainable_token_indices", "alora_invocation_tokens", "layer_replication"])
def test_what_is_trained_beside_the_update_is_refused(field, tmp_path, capsys) -> None:
    run_id = pretend(Store(tmp_path), make_spec(), [random_update(0, 1.0)])
    file = Store(tmp_path).folder(run_id) / "updates" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", field: [[0, 1]]}))
    assert main(["intervene", run_id, "--results", str(tmp_path)]) == 2
    assert f"has {field} = [[0, 1]], which no ΔW stands for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lambdas=-1,0"], "--lambdas -1: must be at least 0"),
        (["--epsilon", "1.5"], "--epsilon 1.5: must be above 0 and at most 1"),
        (["--top", "33"], "--top 33: must be at least 1 and at most 32"),
        (["--figure", "a.gif"], "--figure a.gif: must end in .pdf or .png"),
    ],
)
def test_wrong_flags_are_said_so(flags, message, runs, capsys) -> None:
    store, ids = runs
    assert main(["intervene", ids["lora"], *flags, "--results", str(store.root)]) == 2
    assert capsys.readouterr().err.startswith(f"lorabench: error: {message}")


def test_runs_that_cannot_be_had_are_all_told(runs, tmp_path, capsys) -> None:
    store, ids = runs
    shutil.copytree(store.folder(ids["lora"]), tmp_path / "runs" / ids["lora"])
    with open(tmp_path / "runs" / ids["lora"] / "updates" / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    store_of_failed = Store(tmp_path)
    shutil.copytree(store.folder(ids["full"]), tmp_path / "runs" / ids["full"])
    record = store_of_failed.read(ids["full"])
    record.status = Status.OOM
    store_of_failed.write(record)
    assert main(["intervene", ids["lora"], ids["full"], "zap", "--results", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "not those that its record describes" in err and "is oom, not done" in err and "unknown run 'zap'" in err
    assert main(["intervene", ids["full"], ids["full"], "--results", str(store.root)]) == 2
    assert "is given twice" in capsys.readouterr().err


def made_up(numbers, forgetting, **changes):
    """Records as far as tables read them."""
    return [
        {
            "spec": make_spec(seed=seed, **changes).to_json(),
            "key": {"run_id": f"run-{seed}", "top": 10, "epsilon": 0.5},
            "recorded": {"valid_loss": 2.0},
            "num_matrices": 28,
            **{f"num_{kind}": number for kind in KINDS},
            "points": [
                {"scaled": BASE, "lambda": None, "valid_loss": 3.0, "forgetting": 0.0},
                {"scaled": TUNED, "lambda": 1.0, "valid_loss": 2.0, "forgetting": lost},
                *({"scaled": kind, "lambda": 0.0, "valid_loss": 2.5, "forgetting": lost / 2} for kind in KINDS),
            ],
        }
        for seed, (number, lost) in enumerate(zip(numbers, forgetting, strict=True))
    ]


def test_the_correlation_is_that_of_ranks() -> None:
    numbers, forgetting = [1, 3, 3, 10, 200, 7], [0.1, 0.3, 0.2, 0.9, 1.0, 0.35]
    ranks = [[1, 2.5, 2.5, 5, 6, 4], [1, 3, 2, 5, 6, 4]]

    def settings(numbers, forgetting):
        """Two seeds of each, whose means these are."""
        pairs = enumerate(zip(numbers, forgetting, strict=True), 1)
        return [
            record
            for rank, (number, lost) in pairs
            for record in made_up(
                [number - 1, number + 1], [lost / 2, lost * 1.5], method={"name": "lora", "rank": rank}
            )
        ]

    found = correlation(settings(numbers, forgetting))
    assert found["num_settings"] == len(numbers) and found["num_runs"] == 2 * len(numbers)
    assert found["rho"] == pytest.approx(np.corrcoef(ranks)[0, 1]) and 0 < found["p"] < 0.05
    assert "the same number of intruders (4)" in correlation(settings([4] * 5, forgetting[:5]))["why_not"]
    assert "the same forgetting" in correlation(settings(numbers[:5], [0.5] * 5))["why_not"]
    assert correlation(settings(numbers[:4], forgetting[:4]))["why_not"] == "needs at least 5 settings, and has 4"


def test_changes_are_relative_to_one_and_runs_differ_in_the_seed_alone() -> None:
    records = made_up([4, 8], [0.4, 0.2]) + made_up([3], [-0.1], method={"name": "lora", "rank": 4})
    assert {name: len(group) for name, group in by_setting(records).items()} == {"lora, rank 2": 2, "lora, rank 4": 1}
    wanted = Intervention(lambdas=(0.0,))
    rows = {(row.setting, row.scaled): row for row in make_rows(records, wanted)}
    row = rows["lora, rank 2", INTRUDERS]
    assert (row.num_directions, row.cells["valid_loss_change"].mean) == (6, 25)
    assert row.cells["forgetting_change"].mean == pytest.approx(-50)
    assert rows["lora, rank 4", INTRUDERS].cells["forgetting_change"].mean is None  # nothing was forgotten
    assert "rank 4" in intervention_text(records, list(rows.values()))


def test_a_model_that_is_not_the_runs_own_is_told() -> None:
    records = made_up([4], [0.4])
    wanted = Intervention(lambdas=(0.0,))
    assert "in the run's record" not in intervention_text(records, make_rows(records, wanted))
    records[0] |= {"recorded": {"valid_loss": 2.1}, "num_matrices": 0}
    text = intervention_text(records, make_rows(records, wanted))
    assert "at λ = 1 valid_loss is 2 here, and 2.100 in the run's record" in text
    assert "no matrix that has changed is in the base's files" in text


def state_of(model):
    return {name: tensor.detach().double().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["lora", "gpt2", "films"])
def test_along_the_path_weights_are_the_bases_and_so_many_times_the_change(name, runs) -> None:
    run = run_of(runs, name)
    bench = Bench(run, [], CPU)
    with path.scaled(bench.base, run, 0.0) as model:
        base = state_of(model)
    with path.scaled(bench.base, run, 1.0) as model:
        whole = state_of(model)
    for scale in (0.5, 1.5):
        with path.scaled(bench.base, run, scale) as model:
            for parameter, found in state_of(model).items():
                want = base[parameter] + scale * (whole[parameter] - base[parameter])
                torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(found, base[parameter]) for parameter, found in state_of(bench.base).items())
    assert any(not torch.equal(whole[parameter], found) for parameter, found in base.items())


def test_a_path_begins_at_the_base_goes_through_the_run_and_is_added_to(runs, monkeypatch, capsys, tmp_path) -> None:
    store, ids = runs
    root, measures = ["--results", str(store.root)], store.read(ids["lora"]).measures
    assert main(["intervene", ids["lora"], "--update", "--lambdas", "1", "--device", "cpu", "--json", *root]) == 0
    (record,) = json.loads(capsys.readouterr().out)["paths"]
    assert [point["lambda"] for point in record["points"]] == [0, 1], "forgetting counts from the base"
    first, last = record["points"]
    assert first["valid_loss"] == pytest.approx(measures["base_valid_loss"], rel=1e-5)
    assert last["valid_loss"] == pytest.approx(measures["valid_loss"], rel=1e-4)
    assert (first["forgetting"], last["forgetting"]) == (0, pytest.approx(measures["forgetting"], abs=1e-4))
    assert main(["intervene", ids["lora"], "--update", "--lambdas", "0.5,1", "--device", "cpu", *root]) == 0
    assert "λ = 1:" not in capsys.readouterr().err, "it is there"
    page, monkeypatched = tmp_path / "page.html", "lorabench.adapters.intervention.path.Bench"
    monkeypatch.setattr(monkeypatched, None)
    assert main(["intervene", ids["lora"], "--update", "--lambdas", "0.5", "--html", str(page), *root]) == 0
    assert "λ" in page.read_text() and ids["lora"] in capsys.readouterr().out
    records = {ids["lora"]: store.read(ids["lora"])}
    assert [point["lambda"] for point in read_paths(store.root, records)[ids["lora"]]] == [0, 0.5, 1]
    other = replace(records[ids["lora"]], files={"updates/delta.safetensors": "of another training"})
    (store.root / "paths" / "damaged").mkdir()
    (store.root / "paths" / "damaged" / "record.json").write_text('{"key": {"run_id": 3')
    assert read_paths(store.root, {ids["lora"]: other}) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "--lambdas", "-1"], "--lambdas -1: must be at least 0"),
        (["nothing"], "RUN = nothing: unknown run 'nothing'"),
    ],
)
def test_a_path_that_cannot_be_had_is_told(arguments, message, runs, capsys) -> None:
    name, *more = arguments
    assert main(["intervene", runs[1].get(name, name), "--update", *more, "--results", str(runs[0].root)]) == 2
    assert message in capsys.readouterr().err


def without_none(table):
    """As a sweep file has it: what is None is not named."""
    return {
        key: without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def test_a_sweep_stands_for_its_runs_that_are_done(runs, capsys) -> None:
    store, ids = runs
    told = without_none(store.read(ids["lora"]).spec)
    file = store.root / "mine" / "sweep.toml"
    file.parent.mkdir()
    file.write_text(as_toml({"base": told | {"seed": [told["seed"], 99]}}))
    for name in ("mine", str(file)):
        assert path.runs_of(store, name, pytest.fail) == [ids["lora"]], "seed 99 has not run"
    file.write_text(as_toml({"base": told | {"seed": 99}}))
    assert main(["intervene", "mine", "--update", "--results", str(store.root)]) == 2
    assert "RUN = mine: no run of this sweep is done" in capsys.readouterr().err
