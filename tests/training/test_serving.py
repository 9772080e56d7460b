"""What a run's result takes to use: measured beside the run, and never at its cost."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from lorabench.config import plugins
from lorabench.spec.measures import MEASURES, NUM_RESIDENT
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import inference, serving
from lorabench.training import run as journey
from lorabench.training.execute import Options, execute
from lorabench.training.inference import Workload, as_served, checked_batch, logits
from lorabench.training.meter import GIB
from lorabench.training.serving import RESIDENT, held_bytes, mixed, stored_files, swapped
from lorabench.training.stop import Stop, Stopped
from tests.conftest import BASE, make_spec
from tests.methods.test_methods import IMPOSSIBLE, load_base, method_spec, tuned

QUIET = Options(log_to_file=False, device="cpu")
METHODS = plugins.names("methods")
SERVING = {name for name, measure in MEASURES.items() if measure.group == "serving" and "images" not in name}
DECODE = {name for name in SERVING if "decode" in name}
MERGED = {name for name in SERVING if "_merged_" in name} | {"merge_error"}
MIXED = {"mixed_batch_seconds", "swapped_batch_seconds"}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(inference, "MIN_ROUNDS", 1)
    monkeypatch.setattr(inference, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """A results folder of all tests: what one has run is done for the others."""
    return tmp_path_factory.mktemp("results")


def run(spec, folder):
    store = Store(folder)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store.read(spec.id), store.folder(spec.id)


@pytest.fixture
def quick(tiny_bases):
    """The smallest spec with serving."""
    return lambda **changes: make_spec(model=tiny_bases["llama"], **({"serving": True, "steps": 2} | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": {"name": "full"}}, {"method": {"name": "prefix"}}, {"quantization": "nf4"}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_serving_changes_nothing_else_of_the_run(changes, common, quick):
    spec = quick(**changes)
    (alone, folder), (record, other) = run(dataclasses.replace(spec, serving=False), common), run(spec, common)
    assert record.files == alone.files
    assert not SERVING & set(alone.measures) and "serve_seconds" not in alone.measures
    timed = ("_seconds", "_gib", "_per_second", "_utilization", "_median", "_p95")
    for name, value in alone.measures.items():
        assert name in record.measures
        assert name.endswith(timed) or record.measures[name] == value, name
    steps = [[json.loads(line) for line in (f / "steps.jsonl").read_text().splitlines()] for f in (folder, other)]
    assert [(row["loss"], row["grad_norm"]) for row in steps[0]] == [
        (row["loss"], row["grad_norm"]) for row in steps[1]
    ]
    assert 0 < record.measures["serve_seconds"] < record.measures["total_seconds"]
    assert "serving" not in record.provenance, record.provenance["serving"]


@pytest.mark.parametrize(
    ("name", "base", "absent"),
    [
        ("lora", "llama", set()),
        ("full", "llama", MIXED),
        ("ia3", "gpt2", MIXED),
        ("prompt", "llama", MIXED | MERGED),
        ("adapter", "gpt2", MIXED | MERGED),
        ("hybrid", "llama", MIXED | MERGED),
        ("lora", "bert", DECODE),
        ("head", "roberta", DECODE | MIXED),
        ("prefix", "bert", DECODE | MIXED | MERGED),
    ],
)
def test_what_makes_sense_is_measured(name, base, absent, tiny_bases, labelled, common):
    spec = method_spec(name, base, tiny_bases, labelled, serving=True, steps=2)
    record, _ = run(spec, common)
    found = {key: value for key, value in record.measures.items() if key in SERVING}
    assert set(found) == SERVING - absent, record.provenance
    assert all(value > 0 for key, value in found.items() if not key.startswith(("added_", "merge_error")))
    assert all(value > -1 for key, value in found.items() if key.startswith("added_"))
    if "merge_error" in found:
        assert found["merge_error"] <= inference.TOLERANCE["float32"]
        assert record.provenance["merge_error"].startswith("within the tolerance of 0.001")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_unmerged_and_merged_model_are_there_together(quantization, common, quick, monkeypatch):
    """And share what is frozen: memory holds the merged weights of a quantized base alone beside those of the run."""
    seen = {}

    def look(base, models, work):
        seen.update({"base": base} | models)
        return {}

    monkeypatch.setattr(serving, "compare", look)
    record, _ = run(quick(quantization=quantization, seed=7), common)
    adapted = {name: any("lora_A" in key for key, _ in model.named_parameters()) for name, model in seen.items()}
    assert adapted == {"base": False, "unmerged": True, "merged": False}
    queries = [{name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.data_ptr()
                for name, parameter in model.named_parameters()}["model.layers.0.self_attn.q_proj.weight"]
               for model in seen.values()]  # fmt: skip
    assert len(set(queries)) == (1 if quantization == "none" else 2)
    assert record.provenance["inference"].endswith("base, unmerged, merged in turn, in one race")


def test_what_is_in_the_base_s_architecture_is_merged_already(common, quick):
    record, _ = run(quick(method={"name": "full"}), common)
    for name in MERGED - {"merge_error"}:
        assert record.measures[name] == record.measures[name.replace("merged", "unmerged")]
    assert record.measures["merge_error"] == 0


@pytest.mark.parametrize("base", ["llama", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_the_stored_files_are_what_load_needs(name, base, tiny_bases, labelled, tmp_path):
    if (name, base) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[name, base])
    spec = method_spec(name, base, tiny_bases, labelled)
    model, _, _, examples = tuned(spec, steps=3)
    everything, needed = tmp_path / "everything", tmp_path / "needed"
    everything.mkdir()
    needed.mkdir()
    spec.method.save(model, lambda: load_base(spec, examples), everything, "updates")
    for file in stored_files(everything):
        shutil.copy(file, needed)
    loaded = spec.method.load(load_base(spec, examples), needed, spec).eval()
    batch = checked_batch(examples, torch.device("cpu"))
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "files"),
    [
        ({"name": "lora", "rank": 2}, {"adapter_model.safetensors", "adapter_config.json"}),
        ({"name": "lora", "rank": 2, "dora": True}, {"adapter_model.safetensors", "adapter_config.json"}),
        ({"name": "ia3"}, {"adapter_model.safetensors", "adapter_config.json"}),
        ({"name": "full"}, {"delta.safetensors"}),
    ],
)
def test_storage_is_the_size_of_those_files(method, files, common, quick):
    record, folder = run(quick(method=method), common)
    sizes = {file.name: file.stat().st_size for file in (folder / "updates").iterdir()}
    assert record.measures["storage_bytes"] == sum(sizes[name] for name in files)


def test_a_resident_adapter_takes_what_its_factors_take(common, quick):
    record, _ = run(quick(), common)
    assert record.measures["resident_adapter_gib"] * GIB == record.measures["num_trainable"] * 4
    record, _ = run(quick(method={"name": "full"}), common)
    assert record.measures["resident_adapter_gib"] * GIB == record.measures["num_trainable"] * 4


def test_held_bytes_counts_shared_tensors_once():
    one, two = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    two.weight = one.weight
    assert held_bytes(torch.nn.Sequential(one, two)) == 4 * (15 + 5 + 5)


@pytest.mark.parametrize(
    ("base", "quantization"), [("llama", "none"), ("llama", "nf4"), ("gpt2", "none"), ("bert", "none")]
)
def test_a_mixed_batch_gives_each_row_its_own_adapter(base, quantization, tiny_bases, labelled, tmp_path):
    """Against a model that holds one adapter alone; the adapters differ, and so do the base and the heads."""
    specs = [method_spec("lora", base, tiny_bases, labelled, quantization=quantization, lr=lr, seed=0)
             for lr in (1e-3, 2e-3, 5e-3, 1e-2)]  # fmt: skip
    folders, alone = [tmp_path / name for name in RESIDENT], []
    ids = torch.randint(3, 1000, (8, 12), generator=torch.Generator().manual_seed(0))
    for spec, folder, group in zip(specs, folders, ids.chunk(NUM_RESIDENT), strict=True):
        folder.mkdir()
        model, _, _, examples = tuned(spec, steps=4)
        spec.method.save(model, lambda: None, folder, "updates")
        with torch.no_grad():
            alone.append(model(input_ids=group).logits)
    method = specs[0].method
    several = method.load(load_base(specs[0], examples), folders[0], specs[0])
    for name, folder in zip(RESIDENT[1:], folders[1:], strict=True):
        method.load_another(several, folder, name)
    as_served(several, "float32")
    with torch.no_grad():
        work = Workload(ids=ids, generates=False, options={})
        one_by_one, in_one_pass = swapped(method, several, work), mixed(several, work)
        plain = load_base(specs[0], examples)(input_ids=ids).logits
    torch.testing.assert_close(one_by_one, torch.cat(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(in_one_pass, torch.cat(alone), atol=1e-5, rtol=1e-4)
    for other in (plain, torch.roll(torch.cat(alone), 2, 0)):
        assert (other - in_one_pass).flatten(1).abs().amax(1).min() > 1e-3


def test_what_peft_refuses_is_not_applicable(common, quick):
    """PEFT raises for DoRA: "Cannot pass `adapter_names` when DoRA is enabled"."""
    record, _ = run(quick(method={"name": "lora", "rank": 2, "dora": True}), common)
    assert set(record.measures) & SERVING == SERVING - MIXED
    assert all(record.provenance[name].startswith("not applicable: PEFT") for name in MIXED)
    assert "serving" not in record.provenance


@pytest.mark.parametrize("keep", ["none", "svd:2"])
def test_what_is_not_kept_cannot_be_loaded(keep, common, quick):
    record, _ = run(quick(keep=keep), common)
    missing = MIXED | {"storage_bytes", "adapter_load_seconds", "adapter_swap_seconds", "resident_adapter_gib"}
    assert set(record.measures) & SERVING == SERVING - missing
    assert f'keep = "{keep}"' in record.provenance["serving"]


@pytest.mark.parametrize(
    ("place", "error", "part", "left"),
    [
        ("twin", torch.OutOfMemoryError("CUDA out of memory.\nTried"), "prepare", set()),
        ("compare", NotImplementedError(), "inference", {"storage_bytes", "adapter_swap_seconds", "merge_error"}),
        ("relative_error", ValueError("no"), "merging", {"added_decode_unmerged_batch_1", "storage_bytes"}),
    ],
)
def test_a_failure_costs_its_own_measures_only(place, error, part, left, tmp_path, monkeypatch, quick):
    def fail(*_):
        raise error

    monkeypatch.setattr(serving, place, fail)
    record, _ = run(quick(), tmp_path)
    assert left <= set(record.measures) and bool(SERVING & set(record.measures)) == bool(left)
    assert f"{part}: " in record.provenance["serving"] and type(error).__name__ in record.provenance["serving"]
    assert "\n" not in record.provenance["serving"]
    assert {"valid_loss", "serve_seconds"} <= set(record.measures) and record.files


def test_a_stop_ends_the_measuring_and_not_the_run(tmp_path, monkeypatch, quick):
    """All is saved by then: a run that was stopped here is done."""
    serve = journey._serve

    def stopped(self):
        stopped.count += 1
        if stopped.count == 4:
            raise Stopped("SIGTERM")

    def stop_fourth(*arguments):
        stopped.count = 0
        monkeypatch.setattr(Stop, "check", stopped)
        serve(*arguments)

    monkeypatch.setattr(journey, "_serve", stop_fourth)
    record, _ = run(quick(), tmp_path)
    assert "stopped by SIGTERM before loading" in record.provenance["serving"]
    assert "prefill_base_batch_1_seconds" in record.measures and "storage_bytes" not in record.measures
    assert stopped.count == 4


def test_a_process_that_dies_meanwhile_leaves_the_run_done(tmp_path, monkeypatch, quick):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(serving, "measure", die)
    spec, store = quick(), Store(tmp_path)
    with pytest.raises(Killed):
        execute(spec, store, QUIET)
    record = store.read(spec.id)
    assert store.state(spec.id).status == record.status == Status.DONE
    assert "killed" in record.provenance["serving"] and record.files and record.finished
    assert "valid_loss" in record.measures and not SERVING & set(record.measures)


def test_a_sweep_without_serving_has_no_such_column(tmp_path):
    from lorabench.config.decode import InputError
    from lorabench.spec.sweep import read_sweep

    file = tmp_path / "sweep.toml"
    text = BASE + 'method.name = "full"\nserving = {}\n\n[[table]]\nrows = ["seed"]\n'
    text += 'value = "merge_error"\n'
    file.write_text(text.format("true"))
    assert read_sweep(file).tables[0].values == ["merge_error"]
    file.write_text(text.format("false"))
    with pytest.raises(InputError, match="merge_error"):
        read_sweep(file)
