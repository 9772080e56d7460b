"""Compressed runs: what is evaluated against the runs' own records and against dense weights; every refusal."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel

from lorabench.adapters.compression.compress import compress
from lorabench.adapters.compression.compressible import open_subject
from lorabench.adapters.compression.compression_text import compression_text, copy_adapters
from lorabench.adapters.kept import kept_parts
from lorabench.cli import main
from lorabench.config.decode import InputError
from lorabench.models.weights import add_update
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.base import seeded_base
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import prepare
from lorabench.training.execute import Options, execute
from lorabench.updates.formats import read_layers, read_updates
from lorabench.updates.update import INITIAL_FILE, Update
from tests.adapters.compression.test_truncation import best
from tests.conftest import make_spec
from tests.training.test_sequence import CODE, write_labelled

QUIET = Options(log_to_file=False, device="cpu")
CPU = torch.device("cpu")
TASK = CODE | {"retain": "builtin:english-docs"}


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    """The store, and in it runs by what they are."""
    folder = tmp_path_factory.mktemp("compress")
    store = Store(folder / "results")
    films = write_labelled(folder / "films", ["bad", "good"])
    llama = {"model": tiny_bases["llama"], "task": TASK}
    gpt2 = {"model": tiny_bases["gpt2"], "task": TASK}
    bert = {"model": tiny_bases["bert"], "task": films, "steps": 8, "batch_size": 8}
    lora = {"name": "lora", "rank": 4}
    specs = {
        "lora": make_spec(method=lora | {"rslora": True}, **llama),
        "patterns": make_spec(method=lora | {"rank_pattern": {"q_proj": 2}, "embeddings": True}, **llama),
        "gpt2": make_spec(method=lora, **gpt2),
        "pissa": make_spec(method=lora | {"init": "pissa"}, **llama),
        "dora": make_spec(method=lora | {"dora": True}, **llama),
        "loha": make_spec(method={"name": "loha", "rank": 2}, **llama),
        "nf4": make_spec(method=lora, quantization="nf4", **llama),
        "films": make_spec(method=lora, **bert),
        "full": make_spec(method={"name": "full"}, **llama),
        "tied": make_spec(method={"name": "full"}, **gpt2),
        "full films": make_spec(method={"name": "full"}, **bert),
        "adapter": make_spec(method={"name": "adapter"}, **llama),
        "layernorm": make_spec(method={"name": "layernorm"}, **llama),
        "svd": make_spec(method=lora, keep="svd:2", **llama),
    }
    for spec in specs.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store, {name: spec.id for name, spec in specs.items()}


FACTORED = ["lora", "patterns", "gpt2", "pissa", "nf4", "films"]
DENSE = ["dora", "loha", "full", "tied", "full films"]


def compressed(runs, name, energies, store=None, **options):
    mine, ids = runs
    said: list[str] = []
    store = store or mine
    records = compress(store, open_subject(store, ids.get(name, name), **options), energies, "cpu", said.append)
    return {record["body"]: record for record in records}, said


def adapter_of(store, record):
    return store.root / "compressions" / record["compression_id"] / "adapter"


@pytest.mark.parametrize("name", FACTORED + DENSE)
def test_the_whole_energy_changes_nothing(name, runs) -> None:
    """The base and the adapter as the run measured them, and the adapter at energy 1 as itself, less any vectors."""
    store, ids = runs
    records, _ = compressed(runs, name, [1.0])
    measures, metrics = store.read(ids[name]).measures, {body: record["metrics"] for body, record in records.items()}
    assert metrics["base"]["valid_loss"] == pytest.approx(measures["base_valid_loss"], rel=1e-6)
    assert metrics["full"]["valid_loss"] == pytest.approx(measures["valid_loss"], rel=1e-5)
    if "films" not in name:
        assert metrics["base"]["retain_loss"] == pytest.approx(measures["retain_loss_before"], rel=1e-6)
        assert metrics["full"]["retain_loss"] == pytest.approx(measures["retain_loss_after"], rel=1e-5)
    vectors = records["energy 1"]["left_out"]["num_vectors"]
    assert bool(vectors) == (name in ("full", "tied", "full films"))
    if not vectors:
        assert metrics["energy 1"] == pytest.approx(metrics["full"], rel=1e-4)
    assert records["energy 1"]["relative_error"] < 1e-5
    assert (
        records["energy 1"]["bytes"]
        == (adapter_of(store, records["energy 1"]) / "adapter_model.safetensors").stat().st_size
    )


@pytest.mark.parametrize("name", ["lora", "gpt2", "pissa", "films", *DENSE])
def test_less_energy_is_the_truncated_update_on_the_base(name, runs) -> None:
    store, ids = runs
    spec = store.read_spec(ids[name])
    records, _ = compressed(runs, name, [0.6])
    examples = prepare(spec)
    dense, ranks = seeded_base(spec, examples, CPU), {}
    for update in read_updates(store.folder(ids[name]) / "updates"):
        is_head = update.layer.startswith("classifier")
        if update.shape[1] == 1 and not is_head:
            continue
        delta = update.dense().double().numpy()
        if not is_head:
            delta, ranks[update.layer], _ = best(delta, 0.6)
        add_update(dense, Update(parameter=update.parameter, B=torch.from_numpy(delta).float()))
    assert {row["layer"]: row["rank"] for row in records["energy 0.6"]["layers"]} == ranks
    expected = metrics_of(dense, spec, examples, "validation")
    assert records["energy 0.6"]["metrics"]["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-4)


def test_a_tied_weight_has_factors_on_both_sides_and_is_no_case_for_merging(runs) -> None:
    """ΔW of the shared weight acts twice, so both layers have it; PEFT would add both to the one weight."""
    store, ids = runs
    records, _ = compressed(runs, "tied", [1.0])
    assert records["energy 1"]["tied"] == {"transformer.wte": "lm_head"}
    assert "share one weight and have factors each" in compression_text(store, list(records.values()))
    spec = store.read_spec(ids["tied"])
    base = seeded_base(spec, prepare(spec), CPU)
    before = base.get_input_embeddings().weight.detach().clone()
    tuned = PeftModel.from_pretrained(base, adapter_of(store, records["energy 1"]))
    delta = tuned.get_base_model().transformer.wte.get_delta_weight("default")
    merged = tuned.merge_and_unload().get_input_embeddings().weight
    torch.testing.assert_close(merged - before, 2 * delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "tied", "full films"])
def test_lorabench_reads_what_it_has_compressed(name, runs) -> None:
    store, ids = runs
    records, _ = compressed(runs, name, [0.6])
    before = {layer.parameter: layer for layer in read_layers(store.folder(ids[name]) / "updates")}
    after = {layer.parameter: layer for layer in read_layers(adapter_of(store, records["energy 0.6"]))}
    assert after.keys() - before.keys() == ({"lm_head.weight"} if name == "tied" else set())
    for parameter in before:
        kept = len(after[parameter].svd.S)
        np.testing.assert_allclose(after[parameter].svd.S, before[parameter].svd.S[:kept], rtol=1e-4)
        assert after[parameter].base_norm == before[parameter].base_norm
    assert any("classifier" in parameter for parameter in after) == (name == "full films")


def test_results_are_kept_by_content(runs) -> None:
    store, _ = runs
    first, said = compressed(runs, "lora", [0.71, 0.72])
    assert said[-2:] == ["[3/4] energy 0.71", "[4/4] energy 0.72"]
    assert first["energy 0.71"]["environment"]["packages"]["peft"]
    assert compressed(runs, "lora", [0.71, 0.72]) == (first, [])
    assert compressed(runs, "lora", [0.72, 0.73])[1] == ["[4/4] energy 0.73"]
    folder = adapter_of(store, first["energy 0.71"])
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    again, said = compressed(runs, "lora", [0.71, 0.72])
    assert said == ["[3/4] energy 0.71"] and again["energy 0.71"]["metrics"] == first["energy 0.71"]["metrics"]
    assert again["energy 0.71"]["files"] == first["energy 0.71"]["files"], "the same adapter gives the same bytes"


@pytest.mark.parametrize("name", ["lora", "gpt2", "films", "tied"])
def test_another_adapter_is_evaluated_like_a_run(name, runs, tmp_path) -> None:
    store, ids = runs
    shutil.copytree(store.folder(ids[name]) / "updates", tmp_path / "found")
    mine, _ = compressed(runs, name, [0.8])
    found, _ = compressed(runs, str(tmp_path / "found"), [0.8], like=ids[name])
    assert found.keys() == mine.keys()
    for body in mine:
        assert found[body]["metrics"] == pytest.approx(mine[body]["metrics"], rel=1e-6)
    alone, _ = compressed(runs, str(tmp_path / "found"), [0.8])
    assert alone.keys() == {"full", "energy 0.8"} and alone["energy 0.8"]["metrics"] == {}
    assert alone["energy 0.8"]["ranks"] == found["energy 0.8"]["ranks"]


def refusal(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", "adapter adds computation that no ΔW stands for"),
        ("layernorm", "holds no change of a weight matrix (ΔW)"),
        ("svd", 'has not kept its ΔW (keep = "svd:2")'),
    ],
)
def test_what_has_no_such_form_is_refused(name, message, runs) -> None:
    assert message in refusal(lambda: compressed(runs, name, [0.9]))


def test_another_model_is_refused(runs, tmp_path) -> None:
    store, ids = runs
    shutil.copytree(store.folder(ids["lora"]) / "updates", tmp_path / "found")
    message = refusal(lambda: compressed(runs, str(tmp_path / "found"), [0.9], like=ids["gpt2"]))
    assert "model.layers.0.mlp.down_proj: GPT2LMHeadModel has no such layer" in message and "and so 10 more" in message
    assert "--like" in refusal(lambda: compressed(runs, "lora", [0.9], like=ids["gpt2"]))
    shutil.copytree(store.folder(ids["full"]) / "updates", tmp_path / "dense")
    message = refusal(lambda: compressed(runs, str(tmp_path / "dense"), [0.9], like=ids["nf4"]))
    assert "is quantized, and lorabench cannot be added to that" in message


def test_files_that_were_changed_are_refused(runs, tmp_path) -> None:
    store, ids = runs
    shutil.copytree(store.folder(ids["lora"]), tmp_path / "runs" / ids["lora"])
    with open(tmp_path / "runs" / ids["lora"] / "updates" / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    message = refusal(lambda: open_subject(Store(tmp_path), str(tmp_path / "runs" / ids["lora"])))
    assert "not those that its record describes" in message
    (tmp_path / "runs" / ids["lora"] / "updates" / INITIAL_FILE).touch()
    message = refusal(lambda: open_subject(Store(tmp_path), str(tmp_path / "runs" / ids["lora"])))
    assert "is LoftQ, whose factors also make up for quantization" in message


def test_the_command(runs, tmp_path, capsys) -> None:
    store, ids = runs
    command = ["compress", str(store.folder(ids["full"])), "--energy", "0.5,0.9", "--device", "cpu"]
    command += ["--results", str(store.root)]
    assert main([*command, "--output", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["body", "kept_%", "error", "rank", "parameters", "kib"]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["base", "full", "energy 0.5", "energy 0.9"]
    assert lines[6].startswith("left out: 5 vectors (biases, norms), ")
    for energy in ("0.5", "0.9"):
        assert any(line.startswith(f"energy {energy}: ") and line.endswith("/adapter") for line in lines[7:])
        assert (tmp_path / "out" / f"energy-{energy}" / "adapter_model.safetensors").is_file()
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "is there already, and not empty" in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == "lorabench" and len(shown["compressions"]) == 4
    assert shown["compressions"][2]["kept"] >= 0.5 and shown["compressions"][2]["rank_advice"]["r"] >= 1
    (part,) = (part for part in kept_parts(store, [ids["full"]]) if part.title == f"Compressions of {ids['full']}")
    cells, page = {row[0]: row for row in part.tables[0].cells}, (tmp_path / "page.html").read_text()
    for line in lines[1:5]:
        row = re.split("  +", line)
        assert cells[row[0]] == ["–" if text == "-" else text for text in row]
        assert all(f">{text}</td>" in page for text in cells[row[0]])
    assert any(note.startswith("left out: 5 vectors") for note in part.notes)
    assert main(["compress", "nowhere", "--results", str(store.root)]) == 2
    assert "ADAPTER = nowhere: no such file or folder, and no run of" in capsys.readouterr().err
    assert main(["compress", "lora", "--results", str(store.root)]) == 2
    assert "runs begin so" in capsys.readouterr().err


def test_half_a_copy_is_taken_away(tmp_path):
    adapter = tmp_path / "compressions" / "cut" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    weights = adapter / "adapter_model.safetensors"
    weights.symlink_to("nowhere")  # cannot be copied
    record = {"compression_id": "cut", "body": "energy 0.9", "kept": 0.9}
    with pytest.raises(shutil.Error):
        copy_adapters(Store(tmp_path), [record], tmp_path / "out")
    weights.unlink()
    copy_adapters(Store(tmp_path), [record], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["adapter_config.json"]
