"""`lorabench inspect`: numbers against numpy's SVD of PEFT's own ΔW, and what goes where."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorabench.adapters.examine import inspection_figures
from lorabench.adapters.examine.inspection import inspect_adapter, scale_text, significant
from lorabench.adapters.examine.inspection_page import inspection_page
from lorabench.adapters.examine.inspection_text import inspection_text, pasted
from lorabench.cli import main
from lorabench.terminal import sketch
from lorabench.updates import formats
from lorabench.updates.update import Update, save_updates
from tests.adapter_files import CONFIG, SCALE, deltas, save_dense, save_lora

BERT = "bert.encoder.layer.2.attention.output.dense"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    return folder, deltas(save_lora(folder))


@pytest.fixture(scope="module")
def found(lora):
    return inspect_adapter(formats.open_adapter(lora[0]))


def test_profiles_draw_the_norm_that_all_layers_have(found):
    rows = [row for row in found["layers"] if row["kind"] == found["layers"][0]["kind"]]
    beside_base = [row | {"relative_norm": row["frobenius_norm"] / (7 + row["depth"])} for row in rows]
    for layers, name, label in ((rows, "frobenius_norm", "‖ΔW‖"), (beside_base, "relative_norm", "‖ΔW‖ / ‖W0‖")):
        axes = inspection_figures.profiles(layers).axes[2]
        assert axes.get_ylabel() == label
        assert axes.lines[-1].get_xydata().tolist() == [[row["depth"], row[name]] for row in layers]


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_json_is_numpys_svd_of_pefts_own_change(lora, capsys):
    folder, expected = lora
    code, out, err = run(capsys, folder, "--json")
    table = json.loads(out)
    assert (code, err, table["format"], table["scale_source"], table["notes"]) == (0, "", "peft", "config", [])
    rows = {row["layer"]: row for row in table["layers"]}
    assert rows.keys() == expected.keys() and len(rows) == table["num_layers"] == 6
    for layer, W in expected.items():
        row, S = rows[layer], np.linalg.svd(W.numpy(), compute_uv=False)[:4]
        assert row["singular_values"] == pytest.approx(S, rel=1e-5)
        assert (row["shape"], row["rank"], row["scale"]) == (list(W.shape), 4, SCALE)
        energy = np.cumsum(S**2) / np.sum(S**2)
        assert [row[f"rank_{q}"] for q in (50, 90, 99)] == [1 + int((energy < q / 100).sum()) for q in (50, 90, 99)]
        p = S / S.sum()
        assert row["effective_rank_entropy"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(np.sum(S**2) / S[0] ** 2, rel=1e-5)
        assert row["participation_ratio"] == pytest.approx(np.sum(S**2) ** 2 / np.sum(S**4), rel=1e-5)
        assert row["frobenius_norm"] == pytest.approx(W.norm().item(), rel=1e-5)
        assert row["null"]["rank_90"] > 1 and "frobenius_norm" not in row["null"]
        assert row["null_std"].keys() == row["null"].keys() and 0 < row["null_std"]["stable_rank"] < 2
    total = sum(W.square().sum().item() for W in expected.values()) ** 0.5
    assert table["frobenius_norm"] == pytest.approx(total) and table["relative_norm"] is None


@pytest.mark.parametrize("energy", [0.9, 0.99])
def test_peft_gives_every_layer_the_advised_rank_and_it_keeps_the_energy(lora, found, energy):
    _, expected = lora
    advice = found["rank_advice"][f"{100 * energy:g}"]
    config = LoraConfig(r=advice["r"], rank_pattern=advice["rank_pattern"], target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), config)
    for name, W in expected.items():
        k = model.get_base_model().get_submodule(name).r["default"]
        kept = np.cumsum(np.square(np.linalg.svd(W.numpy(), compute_uv=False))) / W.square().sum().item()
        assert kept[k - 1] >= energy - 1e-6 and (k == 1 or kept[k - 2] < energy)
    assert advice["num_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_is_pasted_is_python(found):
    for advice in found["rank_advice"].values():
        assert eval(f"dict({pasted(advice)})") == {"r": advice["r"], "rank_pattern": advice["rank_pattern"]}


def test_text_is_plain_and_at_most_80_wide(lora, capsys):
    code, out, _ = run(capsys, lora[0], "--energy", "0.8")
    lines = out.splitlines()
    assert code == 0 and "\033" not in out
    assert max(len(line) for line in lines if not line.startswith(str(lora[0]))) <= 80
    assert f"s = {SCALE}, from the adapter's configuration" in out and "6 of 2 kinds, rank 4" in out
    assert re.search(r"^q_proj +3 ", out, re.M) and "80%" in out and "rank_pattern={" in out
    assert not [line for line in lines if line != line.rstrip()]


def test_headings_are_bold_on_a_terminal_alone(found):
    bold, plain = inspection_text(found, 0.95, bold=True), inspection_text(found, 0.95)
    assert re.sub(r"\033\[\d?m", "", bold) == plain != bold


def test_a_page_holds_all_layers_and_needs_no_other_file(lora, found, capsys, tmp_path):
    code, out, err = run(capsys, lora[0], "--html", tmp_path / "pages" / "a.html")
    page = (tmp_path / "pages" / "a.html").read_text("utf-8")
    assert code == 0 and err == f"lorabench: wrote {tmp_path}/pages/a.html\n" and "rank_pattern" in out
    assert page.count("data:image/svg+xml;base64,") == 3 and not re.search(r'src="(?!data:)|<script src|<link', page)
    assert all(row["layer"] in page for row in found["layers"])


def test_names_from_files_are_escaped(found):
    page = inspection_page(found | {"source": "<b>x</b>", "notes": ["<i>y</i>"]}, 0.95)
    assert "<b>x</b>" not in page and "&lt;b&gt;x" in page and "<i>y" not in page


def test_a_dense_change_knows_its_noise_and_its_share_of_the_base(tmp_path):
    W = save_dense(tmp_path, {"model.layers.0.mlp.up_proj": (60, 80), "score": (3, 60), BERT: (70, 60)})
    table = inspect_adapter(formats.open_adapter(tmp_path))
    rows = {row["layer"]: row for row in table["layers"]}
    up = rows["model.layers.0.mlp.up_proj"]
    assert (up["rank"], up["scale"], up["precision"], table["scale_source"]) == (None, None, "float32", None)
    assert up["relative_norm"] == pytest.approx(W["model.layers.0.mlp.up_proj"].norm().item() / 10)
    assert up["powerlaw_alpha"] > 1 and 0 < up["noise_floor"] < 1e-5
    assert rows["score"]["depth"] is None and scale_text(table) == "none (ΔW is stored whole)"
    text = inspection_text(table, 0.95)
    assert "dense" in text and "of now" not in text and max(map(len, text.splitlines()[1:])) <= 80
    assert inspection_page(table, 0.95)


def test_kept_vectors_and_an_adapter_of_rank_one(tmp_path):
    save_dense(tmp_path / "svd", {"a.0.q": (30, 20), "a.1.q": (30, 20)}, keep=3)
    table = inspect_adapter(formats.open_adapter(tmp_path / "svd"))
    assert len(table["layers"][0]["singular_values"]) == 20
    save_lora(tmp_path / "one", r=1)
    one = inspect_adapter(formats.open_adapter(tmp_path / "one"))
    assert one["rank_advice"]["99"]["r"] == 1 and one["rank_advice"]["99"]["rank_pattern"] == {}
    for each in (table, one):
        assert inspection_text(each, 0.95) and inspection_page(each, 0.95)


def test_an_adapter_that_has_not_been_trained(tmp_path, capsys):
    save_lora(tmp_path, init_lora_weights=True)
    code, out, _ = run(capsys, tmp_path, "--json", "--html", tmp_path / "a.html")
    table = json.loads(out)
    assert code == 0 and table["frobenius_norm"] == 0 and table["layers"][0]["rank_90"] is None
    assert table["rank_advice"]["95"] | {"num_parameters": 0, "energy": 0} == {
        "r": 1, "rank_pattern": {}, "num_parameters": 0, "energy": 0,
    }  # fmt: skip
    assert run(capsys, tmp_path)[0] == 0


def test_doras_part_counts_for_ranks_and_not_twice_for_the_norm(tmp_path):
    B, A, W = torch.randn(20, 2), torch.randn(2, 16), torch.randn(20, 16)
    name = "layers.0.q"
    save_updates([Update(parameter=f"{name}.weight", B=W)], tmp_path)
    adapter = formats.open_adapter(tmp_path)

    class Part:
        shape = (20, 16)

        def load(self):
            return Update(parameter=f"{name}[sBA].weight", part="sBA", B=B, A=A, scale=1.0, scale_source="config")

    adapter.entries[f"{name}[sBA].weight"] = Part()
    table = inspect_adapter(adapter)
    assert table["frobenius_norm"] == pytest.approx(W.norm().item()) and table["num_layers"] == 1
    assert table["rank_advice"]["99"]["r"] <= 2 and not table["rank_advice"]["99"]["rank_pattern"]


def test_a_guessed_scale_is_warned_about(lora, monkeypatch, capsys):
    opened = formats.open_adapter(lora[0])
    guessed = formats.Adapter(
        source="x", format="loralib", entries=opened.entries, scale_source="assumed", notes=("alpha = r was assumed",)
    )
    monkeypatch.setattr(formats, "open_adapter", lambda source, **_: guessed)
    code, out, err = run(capsys, lora[0], "--json")
    assert code == 0 and json.loads(out)["notes"] == ["alpha = r was assumed"]
    assert "warning" in err and "--alpha" in err and "alpha = r was assumed" in err
    code, out, err = run(capsys, lora[0])
    assert "ASSUMED" in out and "note    alpha = r was assumed" in out and "warning" in err


def test_wrong_input_is_told_on_stderr_with_exit_code_2(lora, capsys, tmp_path):
    cut = tmp_path / "cut"
    save_lora(cut)
    tensors = load_file(cut / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = torch.nan
    save_file(tensors, cut / "adapter_model.safetensors")
    for name in ("empty", "vectors"):
        (tmp_path / name).mkdir()
    save_updates([Update(parameter="norm.weight", B=torch.randn(6, 1))], tmp_path / "vectors")
    for arguments, words in [
        ((tmp_path / "empty",), "holds no file of tensors"),
        ((tmp_path / "vectors",), "holds no change of a weight matrix"),
        ((cut,), "holds NaN or Inf"),
        ((lora[0], "--energy", "95"), "--energy 95: must be above 0 and at most 1"),
        ((lora[0], "--alpha", "0"), "--alpha 0: must be a number above 0"),
        ((lora[0], "--html", lora[0] / "adapter_config.json" / "x.html"), "adapter_config.json"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert code == 2 and out == "" and words in err and err.startswith("lorabench: error: ")


def test_layers_are_read_one_at_a_time(lora):
    """Nothing is loaded before it is asked for."""
    adapter, loaded = formats.open_adapter(lora[0]), []
    steps = inspect_adapter(adapter, track=lambda layers: (loaded.append(layer.layer) or layer for layer in layers))
    assert loaded == [row["layer"] for row in steps["layers"]]


@pytest.mark.parametrize(
    ("value", "text"), [(3776.2, "3776"), (0.012345, "0.0123"), (100, "100"), (99.96, "100"), (999.7, "1000"), (0, "0")]
)
def test_numbers_keep_their_whole_part(value, text):
    assert significant(value) == text


def test_bars_on_a_log_scale():
    lines = sketch.bars([1, 0.1, 0.01], [1, 1, 0.9], height=2)
    assert lines == ["    1 │┄┄┄", " 1e-1 │██", " 1e-2 └───"]
    assert sketch.blocks([0, 5, None, 10], 0, 10) == "▁▅·█"
    assert sketch.shades([[0, 0.5, 1]], 1.0) == ["  ▒▒██"]


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_a_base_tells_its_share_of_the_weights(lora, tmp_path, form, capsys):
    """‖W0‖ by torch, of every layer that the base has in this shape."""
    folder, expected = lora
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(tmp_path / "base")
    norms = {name: model.get_submodule(name).weight.double().norm().item() for name in expected}
    if form == "kohya":
        folder = as_kohya(folder, tmp_path / "kohya.safetensors")
    code, out, _ = run(capsys, folder, "--base", tmp_path / "base", "--json")
    table = json.loads(out)
    assert code == 0 and len(table["layers"]) == len(norms)
    found = {row["layer"].removeprefix("lora_unet_").replace(".", "_"): row for row in table["layers"]}
    for name, norm in norms.items():
        row = found[name.replace(".", "_")]
        assert row["base_norm"] == pytest.approx(norm, rel=1e-6)
        assert row["relative_norm"] == pytest.approx(expected[name].norm().item() / norm, rel=1e-5)
    total = np.linalg.norm([delta.norm().item() for delta in expected.values()])
    assert table["relative_norm"] == pytest.approx(total / np.linalg.norm([*norms.values()]), rel=1e-5)
    assert run(capsys, folder, "--base", tmp_path / "base")[1].count("% of ‖W0‖") == 1


def test_a_base_of_other_shapes_tells_no_share(lora, tmp_path, capsys):
    config = type(CONFIG)(**CONFIG.to_dict() | {"intermediate_size": CONFIG.intermediate_size + 8})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    table = json.loads(run(capsys, lora[0], "--base", tmp_path, "--json")[1])
    assert {row["kind"]: row["base_norm"] is not None for row in table["layers"]} == {"q_proj": True, "up_proj": False}
    assert any("of 3 layers is not known" in note for note in table["notes"])


def test_a_base_of_8_bits_tells_no_share(lora, tmp_path, capsys):
    """Its scales stand in tensors of their own: what is stored is not W0."""
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t.to(torch.float8_e4m3fn) if "proj" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file)
    table = json.loads(run(capsys, lora[0], "--base", tmp_path, "--json")[1])
    assert table["relative_norm"] is None and any("of 6 layers is not known" in note for note in table["notes"])


def as_kohya(folder, file):
    """The adapter as kohya's scripts would name its tensors."""
    tensors, named = load_file(folder / "adapter_model.safetensors"), {}
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    for name, tensor in tensors.items():
        module, which = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        stem = "lora_unet_" + module.replace(".", "_")
        named[f"{stem}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = tensor
        named[f"{stem}.alpha"] = torch.tensor(SCALE * rank)
    save_file(named, file)
    return file
