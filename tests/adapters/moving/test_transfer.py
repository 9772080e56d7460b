"""Moved adapters: PEFT loads them and computes the formulas' ΔW; a newer version of a base; what is told, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorabench.adapters.compression.compressible import open_subject
from lorabench.adapters.moving.move import move_adapter
from lorabench.adapters.moving.recovery import DRAWS, bootstrap_means, can_evaluate, random_update, table
from lorabench.adapters.moving.transfer import TAKEN, Moved, Transfer
from lorabench.adapters.moving.transfer_text import transfer_part, transfer_text
from lorabench.cli import main
from lorabench.models.base_model import BUILTIN
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import prepare
from lorabench.training.execute import Options, execute
from tests.adapter_files import CONFIG, deltas, save_dense, save_lora
from tests.conftest import make_spec

CODE = {"name": "text", "data": "builtin:python-code", "max_train": 128, "max_eval": 16}
FURTHER = 0.1
"""Of the way from the built-in model to what was trained from it on arithmetic."""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Store, str, Path]:
    """A store with a LoRA run, and a further trained version of its base."""
    root = tmp_path_factory.mktemp("moving")
    method = {"name": "lora", "rank": 4, "targets": "all-linear"}
    spec = make_spec(method=method, model="builtin:tiny-llama", task=CODE, seq_len=64, batch_size=4, steps=30)
    store = Store(root / "results")
    assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    shutil.copytree(BUILTIN / "tiny-llama", root / "newer")
    old, far = (load_file(BUILTIN / name / "model.safetensors") for name in ("tiny-llama", "tiny-llama-arithmetic"))
    newer = {name: weight + FURTHER * (far[name] - weight) for name, weight in old.items()}
    save_file(newer, root / "newer" / "model.safetensors", metadata={"format": "pt"})
    return store, spec.id, root / "newer"


def moved(store: Store, adapter: str, to: str | Path, output: Path, by="project", trained=None, rank=320, **options):
    transfer = Transfer(open_subject(store, adapter, **options), str(to), None, by, rank)
    subject = None if trained is None else open_subject(store, trained)
    return move_adapter(transfer, output, subject, "cpu", lambda _: None)


@pytest.mark.parametrize("by", ["project", "cross-lora"])
def test_a_newer_version_of_the_base(by: str, study: tuple[Store, str, Path], tmp_path: Path) -> None:
    """Most of the gain is there, nothing of it in random directions; PEFT's model has the loss that is told."""
    store, run_id, newer = study
    found = moved(store, run_id, newer, tmp_path / "out", by)
    rows = {row["evaluated"]: row for row in found["losses"]}
    assert rows["moved"]["recovered"] > 0.6 and rows["moved"]["gain_interval"][0] > 0
    assert rows["random"]["recovered"] < 0.2 and "recovered" not in rows["old base + adapter"]
    measures = store.read(run_id).measures
    assert rows["old base"]["loss"] == pytest.approx(measures["base_valid_loss"], rel=1e-5)
    assert rows["old base + adapter"]["loss"] == pytest.approx(measures["valid_loss"], rel=1e-5)
    spec = store.read_spec(run_id)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(newer), tmp_path / "out")
    loss = metrics_of(tuned, spec, prepare(spec), "validation")["valid_loss"]
    assert rows["moved"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert "share of the gain of the adapter on its old base" in transfer_text(found)


def test_the_same_base_and_an_adapter_trained_on_it(study: tuple[Store, str, Path], tmp_path: Path) -> None:
    """ΔW as it is has all of the gain; so has its projection on the layers that W0 spans."""
    store, run_id, _ = study
    found = moved(store, run_id, "builtin:tiny-llama", tmp_path / "out", trained=run_id)
    rows = {row["evaluated"]: row for row in found["losses"]}
    assert rows["trained"]["recovered"] == 1 and rows["trained"]["recovered_interval"] == [1, 1]
    assert rows["copied"]["recovered"] == pytest.approx(1, abs=1e-5)
    square = [row for row in found["layers"] if row["kind"] in ("q_proj", "o_proj")]
    assert len(square) == 8
    for row in square:
        shares = [row[key] for key in ("kept", "kept_null", "overlap_out", "overlap_in", "overlap_in_null")]
        assert shares == pytest.approx([1] * 5, abs=1e-4)
    assert {row["kept_null"] for row in found["layers"] if row["kind"] == "up_proj"} == {(128 / 384) ** 0.5}
    text = transfer_text(found)
    assert "share of the gain of the adapter trained on the new base" in text
    assert transfer_part(found).tables[1].rows[-1]["model"] == "old base + adapter"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The base of `save_lora`'s adapters, and wider ones of more blocks and of fewer."""
    torch.manual_seed(7)
    root, wide = tmp_path_factory.mktemp("bases"), {"hidden_size": 48, "intermediate_size": 80}
    changes = {"old": {}, "deep": wide | {"num_hidden_layers": 6}, "shallow": {"num_hidden_layers": 2}}
    for name, change in changes.items():
        config = LlamaConfig(**CONFIG.to_diff_dict() | {"num_attention_heads": 4, "num_key_value_heads": 2} | change)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in changes}


@pytest.mark.parametrize(("to", "blocks"), [("deep", {0: 1, 1: 3, 2: 5}), ("shallow", {0: 0, 2: 1})])
@pytest.mark.parametrize("by", ["project", "cross-lora"])
def test_peft_computes_what_the_formula_says(by: str, to: str, blocks: dict[int, int], bases, tmp_path: Path) -> None:
    """Up to the signs of the pairs where no width is the same; no other layer has a ΔW."""
    before = deltas(save_lora(tmp_path / "adapter"))
    transfer = Transfer(
        open_subject(Store(tmp_path), str(tmp_path / "adapter")), str(bases[to]), str(bases["old"]), by, 20
    )
    found = move_adapter(transfer, tmp_path / "out", None, "cpu", lambda _: None)
    base = AutoModelForCausalLM.from_pretrained(bases[to])
    after = deltas(PeftModel.from_pretrained(base, tmp_path / "out"))
    source = AutoModelForCausalLM.from_pretrained(bases["old"])
    assert len(after) == 2 * len(blocks) == len(found["layers"]) and not found["losses"]
    for number, new_number in blocks.items():
        for kind in ("self_attn.q_proj", "mlp.up_proj"):
            layer, partner = (f"model.layers.{n}.{kind}" for n in (number, new_number))
            W, W_new = (each.get_submodule(name).weight.double() for each, name in ((source, layer), (base, partner)))
            (U, V), (U_new, V_new) = (leading(matrix, 20) for matrix in (W, W_new))
            left, right = (by == "project" and old == new for old, new in zip(W.shape, W_new.shape, strict=True))
            core = (U_new if left else U).mT @ before[layer] @ (V_new if right else V)
            got = U_new.mT @ after[partner] @ V_new
            assert torch.allclose(got.abs(), core.abs(), atol=1e-4)
            assert float(got.norm()) == pytest.approx(float(after[partner].norm()), rel=1e-5)
    assert set(found["left_out"]) == {f"model.layers.{n}.{k}.weight" for n in {0, 1, 2} - blocks.keys()
                                      for k in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
    text = transfer_text(found)
    assert ("nothing tells the signs" in text) == (to == "deep") and ("left out: model.layers.1" in text) == (
        to != "deep"
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["base_model_name_or_path"] == str(bases[to])


def leading(W: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], Vh[:k].mT


def test_what_is_refused(bases, tiny_bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message each, exit code 2, and nothing written."""
    save_lora(tmp_path / "adapter")
    save_dense(tmp_path / "dense", {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in range(3)})
    save_lora(tmp_path / "dora", use_dora=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    old, out = str(bases["old"]), str(tmp_path / "out")
    known = ["--to", str(bases["deep"]), "--from", old]
    cases = {
        "--by svd: unknown way 'svd'": ["adapter", *known, "--by", "svd", "-o", out],
        "--from: ": ["adapter", *known[:2], "-o", out],
        "--to ": ["adapter", "--to", str(tmp_path / "none"), "--from", old, "-o", out],
        "is not empty": ["adapter", *known, "-o", str(tmp_path / "full")],
        "is dense, so that ΔW is no product of two factors": ["dense", *known, "-o", out],
        "is DoRA, so that ΔW is no product of two factors": ["dora", *known, "-o", out],
        "takes no layer of": ["adapter", "--to", tiny_bases["gpt2"], "--from", old, "-o", out],
        "which --like has to name": ["adapter", *known, "--trained", str(tmp_path / "adapter"), "-o", out],
        "--rank": ["adapter", *known, "--rank", "0", "-o", out],
        "has no such weight, or several": ["adapter", "--to", old, "--from", tiny_bases["gpt2"], "-o", out],
    }
    for message, (name, *flags) in cases.items():
        try:
            code = main(["transfer", str(tmp_path / name), *flags, "--results", str(tmp_path)])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        said = capsys.readouterr()
        assert code == 2 and message in said.err and "Traceback" not in said.err, (message, said.err)
        assert not said.out and not Path(out).exists()


def test_the_command_prints_json_and_a_page(bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(tmp_path / "adapter")
    command = ["transfer", str(tmp_path / "adapter"), "--to", str(bases["deep"]), "--from", str(bases["old"])]
    page = ["--html", str(tmp_path / "page.html")]
    assert main([*command, "-o", str(tmp_path / "out"), "--json", *page]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "project" and len(found["layers"]) == 6
    assert {row["kind"]: row["num_layers"] for row in found["kinds"]} == {"q_proj": 3, "up_proj": 3}
    kept = [row["kept"] for row in found["layers"] if row["kind"] == "up_proj"]
    assert found["kinds"][0]["kept"] == sorted(kept)[1] and found["kinds"][0]["overlap_in"] is None
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and "up_proj" in (
        tmp_path / "page.html"
    ).read_text()
    with pytest.raises(SystemExit):
        main(["transfer", str(tmp_path / "adapter")])


def test_a_partner_is_taken_once(tmp_path: Path) -> None:
    """Two stacks of the old base, and one in the new: the second is left out, and told."""
    weight, peft = torch.randn(4, 4), "base_model.model."
    for folder, stacks in {"old": "ab", "new": "c"}.items():
        (tmp_path / folder).mkdir()
        save_file({f"{s}.0.q.weight": weight.clone() for s in stacks}, tmp_path / folder / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {
        f"{peft}{s}.0.q.lora_{f}.weight": torch.randn(*n) for s in "ab" for f, n in {"A": (1, 4), "B": (4, 1)}.items()
    }
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    subject = open_subject(Store(tmp_path), str(tmp_path / "adapter"))
    transfer = Transfer(subject, str(tmp_path / "new"), str(tmp_path / "old"), "project", 320)
    assert {module: partner for module, (_, partner) in transfer.entries.items()} == {"a.0.q": "c.0.q"}
    assert transfer.left_out == {"b.0.q.weight": TAKEN}


def test_the_random_update_has_the_singular_values_alone() -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(60, 3, generator=g), torch.randn(3, 50, generator=g)
    random, whole = random_update(Moved(partner="layer", B=B, A=A, row={})).dense(), B @ A
    assert torch.allclose(torch.linalg.svdvals(random)[:3], torch.linalg.svdvals(whole)[:3], rtol=1e-4)
    assert abs(float((random * whole).sum() / whole.square().sum())) < 0.1


def test_a_task_with_a_head_is_not_evaluated(tiny_bases, labelled: str) -> None:
    films = make_spec(model=tiny_bases["bert"], task={"name": "classification", "data": labelled})
    assert not can_evaluate(films)
    assert can_evaluate(make_spec(model=tiny_bases["llama"], task=CODE))


def test_intervals_are_those_of_the_mean() -> None:
    """Of many examples as wide as the normal distribution says; what two models share widens no gain."""
    random = np.random.default_rng(3)
    counts, hard = np.full(400, 10.0), random.normal(30, 10, 400)
    losses = {"new base": hard, "moved": hard - 5, "random": hard, "old base": hard, "old base + adapter": hard - 10}
    rows = {row["evaluated"]: row for row in table({k: np.stack([v, counts], 1) for k, v in losses.items()})}
    low, high = rows["new base"]["loss_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * hard.std() / 10 / 20, rel=0.1)
    assert rows["moved"]["gain_interval"] == pytest.approx([0.5, 0.5])
    assert rows["moved"]["recovered"] == pytest.approx(0.5) and rows["random"]["recovered"] == pytest.approx(0)
    assert len(bootstrap_means(np.stack([hard, counts], 1))) == DRAWS


@pytest.mark.parametrize("why", ["no gain", "other tokens"])
def test_no_share_is_told_of_a_gain_that_is_none(why: str) -> None:
    hard = np.random.default_rng(3).normal(30, 10, 50)
    counts = {name: np.full(50, 10.0) for name in ("new base", "moved", "old base", "old base + adapter")}
    losses = {"new base": hard, "moved": hard - 1, "old base": hard, "old base + adapter": hard - 1}
    if why == "no gain":
        losses["old base + adapter"] = np.random.default_rng(4).permutation(hard)
    else:
        counts["old base"] = counts["old base + adapter"] = np.full(50, 11.0)
    rows = table({name: np.stack([losses[name], counts[name]], 1) for name in losses})
    assert not any("recovered" in row for row in rows)
    text = transfer_text({"layers": [], "left_out": {}, "losses": rows})
    assert "recovered: not told" in text
