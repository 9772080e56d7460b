"""Merged adapters: each combination against dense matrices or an independent reimplementation, and every refusal."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorabench.adapters.kept import kept_parts
from lorabench.adapters.merging.adapters import find_run, read_adapter
from lorabench.adapters.merging.bodies import COMBINATIONS, FACTOR_WISE, MERGED, Body, bodies, usual
from lorabench.adapters.merging.compose import Bench, check, compose, put_head
from lorabench.adapters.merging.compose import merge as add_merge
from lorabench.adapters.merging.interference import interference, merge_table, with_changes
from lorabench.adapters.merging.merged_files import merge_folders, write_merges
from lorabench.analyses.interference import Interference
from lorabench.cli import main
from lorabench.commands import merge
from lorabench.config.decode import InputError
from lorabench.methods._peft import tuner_layers
from lorabench.models.base_model import load_base
from lorabench.report.aggregate import interval, plain
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import prepare
from lorabench.training.execute import Options, execute
from lorabench.updates.formats import open_layers, read_updates
from tests.conftest import make_spec
from tests.training.test_sequence import CODE, DOCS, write_labelled

QUIET = Options(log_to_file=False, device="cpu")
CPU = torch.device("cpu")
WEIGHTS = (1.0, 0.5)


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    """The store, and in it runs by what they are."""
    folder = tmp_path_factory.mktemp("compose")
    store = Store(folder / "results")
    films, colours, three = (write_labelled(folder / name, words) for name, words in {
        "films": ["bad", "good"], "colours": ["red", "blue"], "three": ["red", "blue", "green"],
    }.items())  # fmt: skip
    bert = {"model": tiny_bases["bert"], "steps": 12, "batch_size": 8}
    llama = {"model": tiny_bases["llama"]}
    lora = {"name": "lora", "rank": 2}
    specs = {
        "code": make_spec(method=lora | {"alpha": 3.0}, task=CODE, **llama),
        "docs": make_spec(method=lora | {"alpha": 8.0}, task=DOCS, **llama),
        "rs code": make_spec(method=lora | {"rslora": True}, task=CODE, **llama),
        "rs docs": make_spec(method=lora | {"rslora": True}, task=DOCS, **llama),
        "pissa": make_spec(method=lora | {"init": "pissa"}, task=CODE, **llama),
        "rank 4": make_spec(method=lora | {"rank": 4}, task=DOCS, **llama),
        "gpt2 code": make_spec(method=lora, task=CODE, model=tiny_bases["gpt2"]),
        "gpt2 docs": make_spec(method=lora, task=DOCS, model=tiny_bases["gpt2"]),
        "query": make_spec(method=lora | {"targets": "query"}, task=CODE, **llama),
        "dora": make_spec(method=lora | {"dora": True}, task=CODE, **llama),
        "nf4": make_spec(method=lora, task=CODE, quantization="nf4", **llama),
        "loftq": make_spec(method=lora | {"init": "loftq"}, task=CODE, quantization="nf4", **llama),
        "full": make_spec(method={"name": "full"}, task=CODE, **llama),
        "tokens": make_spec(
            method={"name": "peft", "type": "LORA", "config": {"trainable_token_indices": [1]}}, task=CODE, **llama
        ),
        "loha": make_spec(method={"name": "loha"}, task=CODE, **llama),
        "not kept": make_spec(method=lora, task=CODE, keep="none", **llama),
        "bfloat16": make_spec(method=lora, task=CODE, dtype="bfloat16", **llama),
        "bfloat16 docs": make_spec(method=lora, task=DOCS, dtype="bfloat16", **llama),
        "embedded code": make_spec(method=lora | {"embeddings": True}, task=CODE, **llama),
        "embedded docs": make_spec(method=lora | {"embeddings": True}, task=DOCS, **llama),
        "films": make_spec(method=lora, task=films, **bert),
        "colours": make_spec(method=lora, task=colours, **bert),
        "three": make_spec(method=lora, task=three, **bert),
    }
    for spec in specs.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store, {name: spec.id for name, spec in specs.items()}


def read(runs, *names):
    store, ids = runs
    return [read_adapter(store, ids[name]) for name in names]


def merged_deltas(adapters, body: Body) -> dict[str, np.ndarray]:
    """Layer -> ΔW (M, N) of a merge, by PEFT's own delta weight."""
    tuned = Bench(adapters, CPU).model
    add_merge(tuned, ["run_0", "run_1"], body)
    return {
        name: _oriented(module, module.get_delta_weight(MERGED)) for name, module in tuner_layers(tuned)
    }  # fmt: skip


def _oriented(module, delta: torch.Tensor) -> np.ndarray:
    from lorabench.models.weights import is_conv1d

    delta = delta.detach().double().numpy()
    return delta.T if is_conv1d(module.get_base_layer()) or MERGED in module.lora_embedding_A else delta


def updates(adapter) -> dict[str, np.ndarray]:
    """Layer -> ΔW as lorabench reads it from the file, the scale folded in."""
    return {update.layer: update.dense().double().numpy() for update in read_updates(adapter.folder)}


def factors(adapter) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Layer -> B, A, s, read from the adapter's own files."""
    config, found = json.loads((adapter.folder / "adapter_config.json").read_text()), {}
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    for name, A in adapter.factors.items():
        if ".lora_A." in name:
            B = adapter.factors[name.replace(".lora_A.", ".lora_B.")]
            found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = B.numpy(), A.numpy(), scale
    return found


def merge_of(by: str, density: float = 0.5, **fields) -> Body:
    return next(
        body for body in bodies(["a", "b"], [by], WEIGHTS, density, fields.pop("rank", None), [3]) if body.weights
    )


def assert_close(found: dict, expected: dict, rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta, expected[name], rtol=rtol, atol=rtol * np.abs(expected[name]).max())


PAIRS = [("code", "docs"), ("rs code", "rs docs"), ("gpt2 code", "gpt2 docs"), ("code", "rank 4"), ("pissa", "rank 4")]


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_cat_is_the_weighted_sum_of_the_updates(pair, runs) -> None:
    adapters = read(runs, *pair)
    first, second = map(updates, adapters)
    expected = {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in first}
    assert_close(merged_deltas(adapters, merge_of("cat")), expected)
    assert_close(merged_deltas(adapters, merge_of("svd", rank=8)), expected)


def test_svd_is_the_best_approximation_of_its_rank(runs) -> None:
    adapters = read(runs, "code", "docs")
    first, second = map(updates, adapters)
    for name, delta in merged_deltas(adapters, merge_of("svd")).items():
        U, S, Vh = np.linalg.svd(WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name])
        np.testing.assert_allclose(delta, (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-4 * S[0])


@pytest.mark.parametrize("pair", PAIRS[:3], ids=" + ".join)
def test_linear_sums_the_factors_apart(pair, runs) -> None:
    adapters = read(runs, *pair)
    expected = {}
    both = [factors(adapter) for adapter in adapters]
    for name in both[0]:
        parts = [(np.sqrt(w * s), B, A) for w, (B, A, s) in zip(WEIGHTS, (each[name] for each in both), strict=True)]
        expected[name] = sum(root * B for root, B, _ in parts) @ sum(root * A for root, _, A in parts)
    assert_close(merged_deltas(adapters, merge_of("linear")), expected)


def ties(tensors: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Yadav et al. 2023, algorithm 1, entry by entry; weights as PEFT puts them, after the sign is elected."""
    trimmed = []
    for tensor in tensors:
        flat, keep = tensor.flatten(), int(density * tensor.size)
        smallest = np.argsort(np.abs(flat))[: tensor.size - keep]
        flat[smallest] = 0
        trimmed.append(flat)
    merged = np.zeros(tensors[0].size)
    for i in range(merged.size):
        values = [flat[i] for flat in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if np.sign(v) == sign]
        merged[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged.reshape(tensors[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_against_an_independent_reimplementation(density, runs) -> None:
    adapters = read(runs, "code", "docs")
    both, expected = [factors(adapter) for adapter in adapters], {}
    for name in both[0]:
        roots = [np.sqrt(w * each[name][2]) for w, each in zip(WEIGHTS, both, strict=True)]
        expected[name] = ties([e[name][0] for e in both], roots, density) @ ties(
            [e[name][1] for e in both], roots, density
        )
    assert_close(merged_deltas(adapters, merge_of("ties", density)), expected)


def test_ties_svd_works_on_the_updates_themselves(runs) -> None:
    adapters = read(runs, "code", "docs")
    first, second = map(updates, adapters)
    found = merged_deltas(adapters, merge_of("ties_svd", 0.3, rank=64))
    for name, delta in list(found.items())[:2]:
        expected = ties([first[name], second[name]], list(WEIGHTS), 0.3)
        wrong = np.abs(delta - expected) > 1e-4 * np.abs(expected).max()
        assert wrong.mean() < 1e-3  # float32 may trim another one of two nearly equal entries


def test_dare_keeps_entries_by_chance_and_scales_them_up(runs) -> None:
    """Every entry of a factor is a sum of parts that are 0 or 1 / density times their own."""
    adapters = read(runs, "code", "docs")
    tuned = Bench(adapters, CPU).model
    add_merge(tuned, ["run_0", "run_1"], merge_of("dare_linear", 0.4))
    both, kept = [factors(adapter) for adapter in adapters], []
    for name, module in tuner_layers(tuned):
        A = module.lora_A[MERGED].weight.detach().numpy()
        parts = [np.sqrt(w * each[name][2]) * each[name][1] / 0.4 for w, each in zip(WEIGHTS, both, strict=True)]
        sums = np.stack([x * parts[0] + y * parts[1] for x in (0, 1) for y in (0, 1)])
        distance = np.abs(sums - A).min(0)
        assert distance.max() < 1e-5 * np.abs(sums).max()
        kept.append(np.abs(sums - A).argmin(0).flatten())
    found = np.concatenate(kept)
    share = np.mean([found // 2, found % 2])
    assert share == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / (2 * found.size)))


def test_dare_depends_on_its_seed_alone(runs) -> None:
    adapters = read(runs, "code", "docs")
    one, two = (merged_deltas(adapters, merge_of("dare_ties")) for _ in range(2))
    other = merged_deltas(adapters, Body(by="dare_ties", weights=WEIGHTS, density=0.5, seed=4))
    assert_close(one, two, rtol=0)
    assert any(np.abs(one[name] - other[name]).max() > 0 for name in one)


OTHERS = [("rs code", "rank 4"), ("gpt2 code", "gpt2 docs"), ("embedded code", "embedded docs")]


@pytest.mark.parametrize("pair", OTHERS, ids=" + ".join)
def test_merges_of_the_updates_reach_the_model(pair, runs) -> None:
    """What they are is `test_task_vectors`'; here, that PEFT computes with it, whatever the layers are."""
    adapters = read(runs, *pair)
    first, second = map(updates, adapters)
    total = {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in first}
    assert_close(merged_deltas(adapters, merge_of("delta_dare", density=1.0)), total)
    assert_close(merged_deltas(adapters, merge_of("mean")), {name: W / 1.5 for name, W in total.items()})
    ties = merged_deltas(adapters, merge_of("delta_ties", density=1.0))
    for name, W in ties.items():
        same = np.sign(first[name]) == np.sign(second[name])
        np.testing.assert_allclose(W[same], total[name][same] / 2, atol=1e-4 * np.abs(W).max())


def test_density_one_drops_nothing(runs) -> None:
    adapters = read(runs, "code", "docs")
    assert_close(merged_deltas(adapters, merge_of("magnitude_prune", 1.0)), merged_deltas(adapters, merge_of("linear")))


def test_each_body_on_each_task(runs) -> None:
    """The base and the adapters as their own runs measured them, and a merge as W0 + Σ w ΔW computes it."""
    store, ids = runs
    adapters = read(runs, "code", "docs")
    wanted = bodies([ids["code"], ids["docs"]], ["cat"], WEIGHTS, 0.5, None, [0])
    base, code, docs, cat = compose(store, adapters, wanted, "cpu", lambda _: None)
    assert base["tasks"] == ["python-code", "english-docs"]
    for number, (own, adapter) in enumerate(zip((code, docs), adapters, strict=True)):
        measures = adapter.record.measures
        for key in ("valid_loss", "valid_token_accuracy"):
            assert own["metrics"][number][key] == pytest.approx(measures[key], rel=1e-6)
        assert base["metrics"][number]["valid_loss"] == pytest.approx(measures["base_valid_loss"], rel=1e-6)
    dense = load_base(adapters[0].spec, CPU, {})
    with torch.no_grad():
        for weight, adapter in zip(WEIGHTS, adapters, strict=True):
            for update in read_updates(adapter.folder):
                dense.get_parameter(update.parameter).add_(weight * update.dense())
    for cell, adapter in zip(cat["metrics"], adapters, strict=True):
        expected = metrics_of(dense, adapter.spec, prepare(adapter.spec), "validation")
        assert cell["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)


@pytest.mark.parametrize("pair", [("films", "colours"), ("films", "three")], ids=" + ".join)
def test_each_classification_task_has_its_own_head(pair, runs) -> None:
    store, ids = runs
    adapters = read(runs, *pair)
    wanted = bodies([ids[name] for name in pair], ["cat"], WEIGHTS, 0.5, None, [0])
    _, first, second, cat = compose(store, adapters, wanted, "cpu", lambda _: None)
    for own, number in ((first, 0), (second, 1)):
        assert own["metrics"][number]["valid_accuracy"] == adapters[number].record.measures["valid_accuracy"]
        assert own["metrics"][number]["valid_loss"] == pytest.approx(
            adapters[number].record.measures["valid_loss"], rel=1e-5
        )
    for cell, adapter in zip(cat["metrics"], adapters, strict=True):
        base = load_base(adapter.spec, CPU, prepare(adapter.spec).model_options)
        with torch.no_grad():
            for name, tensor in adapter.head.items():
                base.get_parameter(name).copy_(tensor)
            for weight, each in zip(WEIGHTS, adapters, strict=True):
                for layer, (B, A, s) in factors(each).items():
                    base.get_submodule(layer).weight.add_(torch.tensor(weight * s * B @ A))
        expected = metrics_of(base, adapter.spec, prepare(adapter.spec), "validation")
        assert cell["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)


OUTPUTS = {
    ("code", "docs"): ("linear", "ties", "svd", "cat", "dare_ties_svd"),
    ("gpt2 code", "gpt2 docs"): ("linear", "svd"),
    ("code", "rank 4"): ("cat", "ties_svd"),
    ("pissa", "rank 4"): ("cat", "svd"),
    ("embedded code", "embedded docs"): ("cat", "dare_ties"),
    ("bfloat16", "bfloat16 docs"): ("cat",),
    ("films", "three"): ("cat", "ties"),
}


@pytest.mark.parametrize("pair", OUTPUTS, ids=" + ".join)
def test_peft_loads_what_is_written_with_the_logits_of_the_merge(pair, runs, tmp_path) -> None:
    from peft import PeftModel

    adapters = read(runs, *pair)
    wanted = bodies([runs[1][name] for name in pair], OUTPUTS[pair], WEIGHTS, 0.5, None, [3])
    folders = merge_folders(wanted, tmp_path / "out")
    told = write_merges(adapters, folders, CPU)
    bench, options = Bench(adapters, CPU), prepare(adapters[0].spec).model_options
    (first, second), close = map(updates, adapters), {"atol": 2e-5, "rtol": 1e-4}
    summed = {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in adapters[0].layers}
    close = {"atol": 2e-2, "rtol": 2e-2} if "bfloat16" in pair else close
    for (body, folder), written in zip(folders.items(), told, strict=True):
        loaded = PeftModel.from_pretrained(load_base(adapters[0].spec, CPU, options), folder)
        with bench.merged(body) as model:
            for each in (model, loaded):
                put_head(each.get_base_model(), adapters[0].head)
            torch.testing.assert_close(logits(loaded), logits(model), **close)
            with model.disable_adapter():
                assert (logits(loaded) - logits(model)).abs().max() > 1e-4
        found = updates(replace(adapters[0], folder=folder))
        parts = [(np.square(found[name] - summed[name]).sum(), np.square(summed[name]).sum()) for name in found]
        assert written.distance == pytest.approx(np.sqrt(np.divide(*np.sum(parts, 0))), rel=1e-2, abs=1e-4)
        assert (written.distance < 1e-4) == (body.by == "cat") and written.folder == str(folder)
        assert len(written.left_out) == (2 if "films" in pair else 0)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(6)[None]).logits


def test_the_command_writes_its_merges(runs, tmp_path, capsys) -> None:
    store, ids = runs
    command = ["merge", ids["films"], ids["colours"], "--results", str(store.root), "--device", "cpu"]
    command += ["--by", "cat,dare_ties", "--seed", "0,1", "--output", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    output = capsys.readouterr()
    written = json.loads(output.out)["written"]
    names = ["cat", "dare_ties-seed-0", "dare_ties-seed-1"]
    assert [each["folder"] for each in written] == [str(tmp_path / "out" / name) for name in names]
    assert written[0]["ranks"] == [4, 4] and written[1]["ranks"] == [2, 2]
    assert (
        f"left out: {ids['films']}: bert.pooler" in output.err or f"left out: {ids['films']}: classifier" in output.err
    )
    assert "cat: rank 4, " in output.err
    assert all((tmp_path / "out" / name / "adapter_config.json").is_file() for name in names)
    assert main(command) == 2
    assert "is there already, and not empty" in capsys.readouterr().err


def test_bfloat16_factors_are_merged_in_float32(runs) -> None:
    adapters = read(runs, "bfloat16", "bfloat16 docs")
    first, second = map(updates, adapters)
    expected = {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in first}
    assert_close(merged_deltas(adapters, merge_of("svd", rank=8)), expected)


def test_results_are_kept_by_content(runs, monkeypatch) -> None:
    store, ids = runs
    adapters = read(runs, "code", "docs")

    def once(density: float, seeds: list[int]) -> tuple[list[dict], list[str]]:
        said: list[str] = []
        wanted = bodies([ids["code"], ids["docs"]], ["ties", "dare_ties"], WEIGHTS, density, None, seeds)
        return compose(store, adapters, wanted, "cpu", said.append), said

    first, said = once(0.25, [0, 1])
    assert [line for line in said if "ties" in line] == [
        "[4/6] ties (weights 1:0.5, density 0.25, A and B apart)",
        "[5/6] dare_ties (weights 1:0.5, density 0.25, A and B apart), seed 0",
        "[6/6] dare_ties (weights 1:0.5, density 0.25, A and B apart), seed 1",
    ]
    for record in first:
        kept = json.loads((store.root / "merges" / record["merge_id"] / "record.json").read_text())
        assert kept == record and kept["environment"]["packages"]["peft"]
    assert once(0.25, [0, 1]) == (first, [])
    assert len(once(0.75, [1])[1]) == 2  # base and adapters are there already
    file = store.root / "merges" / first[3]["merge_id"] / "record.json"
    file.write_text(file.read_text()[:100])
    again, said = once(0.25, [0, 1])
    assert len(said) == 1 and again[3]["metrics"] == first[3]["metrics"]


def refusal(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full", "has kept no adapter"),
        ("loha", "is LOHA; PEFT merges LoRA adapters alone"),
        ("dora", "is DoRA"),
        ("loftq", "is LoftQ"),
        ("tokens", "has trainable_token_indices = [1]; PEFT merges factors of modules alone"),
        ("not kept", "has kept no adapter"),
    ],
)
def test_what_is_no_lora_is_refused(name, message, runs) -> None:
    assert message in refusal(lambda: read(runs, name))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("code", "query"), "are not on the same layers"),
        (("code", "gpt2 docs"), "have not the same base: model, model_sha256 differ"),
        (("code", "nf4"), "have not the same base: quantization differ"),
        (("code", "films"), "kind of task differ"),
        (("code", "rank 4"), "--by ties: sums factors, which needs one rank, and"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(pair, message, runs) -> None:
    _, ids = runs
    wanted = bodies([ids[name] for name in pair], ["ties"], [1, 1], 0.5, None, [0])
    assert message in refusal(lambda: check(read(runs, *pair), wanted))


def test_what_needs_equal_ranks_is_what_peft_refuses(runs) -> None:
    adapters = read(runs, "code", "rank 4")
    for by in COMBINATIONS:
        tuned = Bench(adapters, CPU).model
        if by in FACTOR_WISE:
            assert "same r value" in refusal(
                lambda tuned=tuned, by=by: add_merge(tuned, ["run_0", "run_1"], merge_of(by))
            )
        else:
            add_merge(tuned, ["run_0", "run_1"], merge_of(by))


def test_what_is_tried_unasked_can_be_made_of_any_ranks(runs) -> None:
    for pair, is_alike in (("code", "docs"), True), (("code", "rank 4"), False):
        adapters = read(runs, *pair)
        by = usual([adapter.ranks for adapter in adapters])
        assert ("linear" in by) is is_alike and "svd" in by
        check(adapters, bodies([adapter.record.run_id for adapter in adapters], by, [1, 1], 0.5, None, [0]))


def test_runs_are_found_by_what_their_ids_begin_with(runs) -> None:
    store, ids = runs
    assert find_run(store, ids["code"]) == find_run(store, ids["code"][:-2]) == ids["code"]
    assert find_run(store, str(store.folder(ids["code"]))) == ids["code"]
    assert "runs begin so" in refusal(lambda: find_run(store, "lora-"))
    assert "unknown run 'zap'" in refusal(lambda: find_run(store, "zap"))
    assert "is not those" not in refusal(lambda: find_run(store, ""))


def test_files_that_were_changed_are_refused(runs, tmp_path) -> None:
    import shutil

    store, ids = runs
    shutil.copytree(store.folder(ids["code"]), tmp_path / "runs" / ids["code"])
    with open(tmp_path / "runs" / ids["code"] / "updates" / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    assert "not those that its record describes" in refusal(lambda: read_adapter(Store(tmp_path), ids["code"]))


def test_the_command(runs, tmp_path, capsys) -> None:
    store, ids = runs
    command = ["merge", ids["code"], ids["docs"], "--by", "linear,dare_linear", "--seed", "0,1", "--device", "cpu"]
    command += ["--results", str(store.root)]
    assert main([*command, "--html", str(tmp_path / "merges.html")]) == 0
    out, err = capsys.readouterr()
    lines, changes, pairs = (block.splitlines() for block in out.strip().split("\n\n"))
    assert lines[0] == "valid_loss (nats), by body and task"
    assert [line.split()[0] for line in lines[1:]] == [
        "body",
        "base",
        ids["code"],
        ids["docs"],
        "linear",
        "dare_linear",
    ]
    assert "±" in lines[-1] and "[4/6] linear" in err
    assert err.count("dare_linear merges A and B apart, as PEFT does; what its paper defines") == 1
    assert [line.split()[0] for line in changes[1:]] == ["body", "linear", "dare_linear"] and "±" in changes[-1]
    assert [line.split()[:3] for line in pairs[2:]] == [[ids["code"], ids["docs"], m] for m in Interference.metrics]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    values = [record["metrics"][0]["valid_loss"] for record in shown["merges"][-2:]]
    assert f"{interval(values)[0]:.2f}" in lines[-1]
    linear = shown["merges"][3]["change"]
    shown_change = changes[2].partition("apart)")[2].split()[0]
    assert plain(linear[ids["code"]]["valid_loss"]).lstrip("−") == shown_change.lstrip("+−")
    assert shown["interference"][0]["metrics"].keys() == Interference.metrics.keys()
    for by in COMBINATIONS:
        assert by in (merge.__doc__ or "")
    page = (tmp_path / "merges.html").read_text()
    mine = [
        part for part in kept_parts(store, ids.values()) if part.title == f"Merges of {ids['code']} and {ids['docs']}"
    ]
    assert f"<h2>{mine[0].title}</h2>" in page and len(mine) == 1
    kept = {row[0]: row[1:] for row in mine[0].tables[0].cells}
    for line in lines[2:]:
        body, *cells = re.split("  +", line)
        assert kept[body] == cells and all(f">{cell}</td>" in page for cell in (body, *cells))
    assert not any("Merges" in part.title for part in kept_parts(store, [ids["code"]]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--by", "tie"], "--by tie: unknown combination 'tie'. Did you mean 'ties'?"),
        (["--weights", "1"], "--weights 1.0: must be 2, one a run"),
        (["--density", "0"], "--density 0: must be above 0"),
        (["--density", "1.5"], "--density 1.5: must be above 0 and at most 1"),
    ],
)
def test_wrong_flags_are_said_so(flags, message, runs, capsys) -> None:
    store, ids = runs
    assert main(["merge", ids["code"], ids["docs"], *flags, "--results", str(store.root)]) == 2
    assert capsys.readouterr().err.startswith(f"lorabench: error: {message}")


def test_one_run_is_no_merge(runs, capsys) -> None:
    store, ids = runs
    assert main(["merge", ids["code"], ids["code"], "--results", str(store.root)]) == 2
    assert "needs at least two runs, each once" in capsys.readouterr().err


def test_interference_is_the_mean_over_the_layers_that_are_merged(runs) -> None:
    store, _ = runs
    adapters = read(runs, "code", "docs")
    first, second = map(updates, adapters)
    (found,) = interference(store, adapters, lambda _: None)
    cosines = [
        float((first[n] * second[n]).sum() / np.linalg.norm(first[n]) / np.linalg.norm(second[n])) for n in first
    ]
    assert found["metrics"]["cosine"]["mean"] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert found["metrics"]["cosine"]["std"] == pytest.approx(np.std(cosines, ddof=1), rel=1e-4)
    spread = np.mean([first[name].size ** -0.5 for name in first])
    assert found["metrics"]["cosine"]["chance_std"] == pytest.approx(spread)
    conflicts = [np.mean(np.sign(first[name]) != np.sign(second[name])) for name in first]
    assert found["metrics"]["sign_conflict"]["mean"] == pytest.approx(np.mean(conflicts), abs=1e-4)
    file = store.root / "pairs" / f"{'--'.join(a.record.run_id for a in adapters)}.zip"
    before = file.stat().st_mtime_ns
    assert interference(store, adapters, lambda _: None) == [found] and file.stat().st_mtime_ns == before


def test_interference_leaves_the_heads_out(runs) -> None:
    store, _ = runs
    adapters = read(runs, "films", "colours")
    (found,) = interference(store, adapters, lambda _: None)
    layers = open_layers(adapters[0].folder)
    assert "classifier.weight" in layers and found["metrics"]["cosine"]["num_layers"] == len(layers) - 1


@pytest.mark.parametrize("pair", [("code", "docs"), ("films", "colours"), ("code", "pissa")], ids=" + ".join)
def test_the_change_is_against_the_adapter_alone_on_its_own_task(pair, runs) -> None:
    store, ids = runs
    adapters = read(runs, *pair)
    wanted = bodies([ids[name] for name in pair], ["cat"], WEIGHTS, 0.5, None, [0])
    records = compose(store, adapters, wanted, "cpu", lambda _: None)
    base, *alone, merge = with_changes(records, wanted, adapters)
    assert "change" not in base and "change" not in alone[0]
    for adapter, record in zip(adapters, alone, strict=True):
        column = 0 if len(record["tasks"]) == 1 else [a.record.run_id for a in adapters].index(adapter.record.run_id)
        expected = merge["metrics"][column]["valid_loss"] - record["metrics"][column]["valid_loss"]
        assert merge["change"][adapter.record.run_id]["valid_loss"] == pytest.approx(expected)
    assert len(merge["tasks"]) == (1 if "pissa" in pair else 2)


def test_text_shows_the_mean_over_seeds() -> None:
    wanted = [Body(by="dare_ties", weights=(1, 1), density=0.5, seed=seed) for seed in (0, 1)]
    records = [{"tasks": ["a"], "metrics": [{"valid_accuracy": value}]} for value in (0.5, 0.7)]
    last = merge_table(records, wanted).text.splitlines()[-1]
    assert last.startswith("dare_ties (density 0.5, A and B apart)  60 ± ")


def test_records_are_below_the_results_folder(runs) -> None:
    store, _ = runs
    assert all(path.parent.parent == Path(store.root) / "merges" for path in store.root.glob("merges/*/record.json"))
