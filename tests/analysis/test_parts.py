"""Fused matrices and experts in the analyses: parts are the rows of ΔW and of W0, from a run to the tables."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
import transformers as t

import lorabench
from lorabench.analysis.analyze import analyze
from lorabench.config.decode import InputError
from lorabench.data.dataset import BUILTIN
from lorabench.spec.sweep import parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from lorabench.updates import parts
from lorabench.updates.formats import read_updates
from tests import families

TEXT = """
[base]
model = "{model}"
task.name = "text"
task.data = "builtin:python-code"
task.max_train = 16
task.max_eval = 4
seq_len = 32
batch_size = 2
steps = 3
snapshot_every = 2
serving = false
[[grid]]
method.name = "lora"
method.rank = 2
lr = 1e-2
[[grid]]
method.name = "lora"
method.rank = 2
method.dora = true
method.targets = "attention"
lr = 1e-2
[[grid]]
method.name = "full"
lr = 1e-3
[[grid]]
method.name = "lora"
method.rank = 2
keep = "svd:2"
lr = 1e-2
"""
PHI = {"self_attn.qkv_proj": {"q": range(32), "k": range(32, 48), "v": range(48, 64)},
       "mlp.gate_up_proj": {"gate": range(64), "up": range(64, 128)}}  # fmt: skip
"""Rows of the tiny Phi-3: 4 heads of width 8, 2 of keys and values."""


def trained(family, folder, text=TEXT):
    """The store, the sweep and the base of runs of a few steps."""
    torch.manual_seed(0)
    base = families.make(family, "cpu")
    base.save_pretrained(folder / "base")
    t.AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama").save_pretrained(folder / "base")
    text = text.replace("{model}", str(folder / "base"))
    store, sweep = Store(folder / "results"), parse_sweep(tomllib.loads(text), text, default_name="parts")
    for spec in sweep.runs:
        assert execute(spec, store, Options(device="cpu")) == Status.DONE, store.read(spec.id).error
    return store, sweep, base


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return trained("phi3", tmp_path_factory.mktemp("phi"))


def values(frame, run_id, metric):
    rows = frame[(frame["run_id"] == run_id) & (frame["metric"] == metric)]
    return dict(zip(rows["layer"], rows["value"], strict=True))


def deltas(store, spec):
    return {update.layer: update.dense().double() for update in read_updates(store.folder(spec.id) / "updates")}


def test_parts_are_rows_of_the_update_and_of_the_base(phi):
    store, sweep, base = phi
    frames = analyze(store, sweep)
    for spec in (spec for spec in sweep.runs if spec.keep == "updates"):
        found = {name: values(frames["spectrum"], spec.id, name)
                 for name in ("frobenius_norm", "stable_rank", "relative_norm")}  # fmt: skip
        norms = values(frames["alignment"], spec.id, "base_norm")
        delta, count = deltas(store, spec), 0
        for block in (0, 1):
            for leaf, rows in PHI.items():
                layer = f"model.layers.{block}.{leaf}"
                for kind, of in rows.items() if layer in delta else ():
                    S = torch.linalg.svdvals(delta[layer][list(of)])
                    W0 = base.get_parameter(f"{layer}.weight").detach()[list(of)].norm().item()
                    part, count = f"{layer}[{kind}]", count + 1
                    assert found["frobenius_norm"][part] == pytest.approx(S.norm().item(), rel=1e-4)
                    assert found["stable_rank"][part] == pytest.approx(float((S / S[0]).square().sum()), rel=1e-4)
                    assert found["relative_norm"][part] == pytest.approx(S.norm().item() / W0, rel=1e-4)
                    assert norms[part] == pytest.approx(W0, rel=1e-4)
                assert layer not in found["frobenius_norm"]
        assert count == (6 if getattr(spec.method, "dora", False) else 10)


def test_of_dora_the_share_of_the_factors_has_parts_too(phi):
    store, sweep, _ = phi
    spec = next(spec for spec in sweep.runs if getattr(spec.method, "dora", False))
    layers = values(analyze(store, sweep)["spectrum"], spec.id, "frobenius_norm")
    layer = "model.layers.1.self_attn.qkv_proj"
    assert {f"{layer}[{kind}]{share}" for kind in "qkv" for share in ("", "[sBA]")} <= layers.keys()


def test_a_run_that_is_loaded_has_them_beside_the_whole(phi):
    store, sweep, base = phi
    for spec in sweep.runs:
        updates = lorabench.load(store.folder(spec.id))
        kinds = "qkv" if spec.keep == "updates" else ""
        layer = "model.layers.1.self_attn.qkv_proj"
        assert {name for name in updates if name.startswith(layer) and "sBA" not in name} == {
            layer,
            *(f"{layer}[{kind}]" for kind in kinds),
        }
        if kinds:
            W0 = base.get_parameter(f"{layer}.weight").detach()[list(PHI["self_attn.qkv_proj"]["k"])]
            assert updates.layers[f"{layer}[k]"].base_norm == pytest.approx(W0.norm().item(), rel=1e-4)


def test_snapshots_have_the_same_parts(phi):
    store, sweep, _ = phi
    dynamics = analyze(store, sweep)["dynamics"]
    kinds = {"qkv_proj[q]", "qkv_proj[k]", "qkv_proj[v]", "gate_up_proj[gate]", "gate_up_proj[up]"}
    for spec in sweep.runs[:1]:
        rows = dynamics[(dynamics["run_id"] == spec.id) & (dynamics["metric"] == "norm_share")]
        assert kinds <= set(rows["kind"]) and set(rows["step"]) == {2, 3}


def test_a_run_of_before_and_kept_singular_vectors_are_analyzed_whole(phi, tmp_path):
    store, sweep, _ = phi
    kept = next(spec for spec in sweep.runs if spec.keep != "updates")
    assert json.loads((store.folder(kept.id) / "updates" / parts.PARTS_FILE).read_text()) == {}
    assert {"qkv_proj", "gate_up_proj"} <= kinds_of(store, sweep, kept)
    spec = sweep.runs[0]
    assert "qkv_proj[q]" in kinds_of(store, sweep, spec) and "qkv_proj" not in kinds_of(store, sweep, spec)
    make_old(store, spec)
    assert "qkv_proj" in kinds_of(store, sweep, spec) and "qkv_proj[q]" not in kinds_of(store, sweep, spec)


def make_old(store, spec):
    """As an earlier version has left it."""
    record = store.read(spec.id)
    for path in [path for path in record.files if path.endswith(parts.PARTS_FILE)]:
        (store.folder(spec.id) / path).unlink()
        del record.files[path]
    store.write(record)


def kinds_of(store, sweep, spec):
    spectrum = analyze(store, sweep)["spectrum"]
    return set(spectrum[spectrum["run_id"] == spec.id]["kind"])


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_are_held_against_their_own_weights(family, tmp_path):
    """Though the base's files do not keep them as they are stacked in the model."""
    head = TEXT.partition("[[grid]]")[0].replace("snapshot_every = 2\n", "")
    text = head + '[[grid]]\nmethod.name = "lora"\nmethod.rank = 2\nmethod.targets = "mlp"\nlr = 1e-2\n'
    store, sweep, base = trained(family, tmp_path, text)
    norms = values(analyze(store, sweep)["alignment"], sweep.runs[0].id, "base_norm")
    stacks = {name: parameter.detach() for name, parameter in base.named_parameters() if parameter.ndim == 3}
    want = {}
    for name, stack in stacks.items():
        if name.endswith("down_proj"):
            want |= {f"{name}[{e}]": expert.norm() for e, expert in enumerate(stack)}
        else:
            halves = dict(zip(("gate", "up"), stack.chunk(2, 1), strict=True))
            want |= {
                f"{name}[{kind}][{e}]": half.norm() for kind, part in halves.items() for e, half in enumerate(part)
            }
    routers = [name.removesuffix(".weight") for name, _ in base.named_parameters() if name.endswith("gate.weight")]
    want |= {name: base.get_parameter(f"{name}.weight").detach().norm() for name in routers}
    assert norms.keys() == want.keys() and len(want) == 2 * (3 * 4 + 1)
    assert all(norms[layer] == pytest.approx(float(norm), rel=1e-4) for layer, norm in want.items())
    make_old(store, sweep.runs[0])
    found = set(analyze(store, sweep)["alignment"]["layer"])
    assert not any("experts" in layer for layer in found), "whose cache another version may have filled"


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_experts_that_files_keep_stacked_are_held_against_theirs(family, tmp_path):
    text = TEXT.partition("[[grid]]")[0].replace("snapshot_every = 2\n", "")
    text += '[[grid]]\nmethod.name = "lora"\nmethod.rank = 2\nmethod.targets = "mlp"\nlr = 1e-2\n'
    store, sweep, base = trained(family, tmp_path, text)
    frames = analyze(store, sweep)
    norms = values(frames["alignment"], sweep.runs[0].id, "base_norm")
    want = {}
    for name, stack in ((name, p.detach()) for name, p in base.named_parameters() if p.ndim == 3):
        parts_of = {"[gate]": slice(0, None, 2), "[up]": slice(1, None, 2)}  # of gpt-oss, the columns in turn
        if family == "llama4" or name.endswith("down_proj"):
            parts_of = {"": slice(None)}
        want |= {f"{name}{kind}[{e}]": expert[:, columns].norm()
                 for kind, columns in parts_of.items() for e, expert in enumerate(stack)}  # fmt: skip
    assert {layer for layer in norms if "experts" in layer} == want.keys()
    assert all(norms[layer] == pytest.approx(float(norm), rel=1e-4) for layer, norm in want.items())
    assert want.keys() <= set(frames["intruders"]["layer"])


def test_names():
    assert parts.part_name("a.qkv_proj.weight", "q") == "a.qkv_proj[q].weight"
    assert parts.part_name("a.gate_up_proj[3].weight", "up") == "a.gate_up_proj[up][3].weight"
    assert parts.part_name("a.qkv_proj[sBA].weight", "q") == "a.qkv_proj[q][sBA].weight"
    for name in ("a.qkv_proj.weight", "a.gate_up_proj[3].weight"):
        assert parts.fused_name(parts.part_name(name, "gate")) == name == parts.fused_name(name)


@pytest.mark.parametrize("table", [{"a.weight": ["q"]}, {"a.weight": {"q": {"rows": 3}}}, {"a.weight": {"q": 3}}])
def test_a_file_of_parts_that_is_none(table, tmp_path):
    (tmp_path / parts.PARTS_FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"parts\.json: must be a table of parts"):
        parts.split({}, tmp_path)
